"""What people and programs state to a deployment is data: no shell, no git and no DVC takes any of it for an option or a command."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import ValidationError

from flows import evaluate, nightly, pipeline
from flows.evaluate import Checkpoint
from flows.project import dvc_command, git, registry, worktree
from flows.run.config import RunConfig, parse_overrides
from tasks.params import load
from tasks.params.yaml_file import read_yaml
from tests.flows import project
from tests.preloaded import PreloadedPython

ROOT = Path(__file__).parents[2]
ATTACKS = [
    "x; touch planted",
    "$(touch planted)",
    "`touch planted`",
    "x && touch planted",
    "x | touch planted",
    "x\ntouch planted",
    "x\r\ntouch planted",
    "x > planted",
    "--upload-pack=touch planted",
    "-c",
    "../../planted",
    "x y",
    "x\0planted",
    "${IFS}touch${IFS}planted",
    "x'; touch planted; '",
    'x"; touch planted; "',
    "",
]


@pytest.fixture(autouse=True)
def _dvc_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_command, "sys", PreloadedPython())


HARMLESS = {"../../planted"}  # to what takes a path: a checkpoint may lie anywhere on the worker's machine


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_form_takes_no_command(attack: str) -> None:
    """Fields that become words of a command or names of files."""
    for field in ("profile", "from_stage", "to_stage"):
        with pytest.raises(ValidationError):
            RunConfig.model_validate({field: attack})
    for config, field in ((RunConfig, "stages"), (Checkpoint, "measured")):
        with pytest.raises(ValidationError):
            config.model_validate({"checkpoint": "models/stage2", field: [attack]} if config is Checkpoint else {field: [attack]})
    with pytest.raises(ValidationError):
        Checkpoint.model_validate({"checkpoint": "models/stage2", "stage": attack})
    if attack not in HARMLESS:
        with pytest.raises(ValidationError):
            Checkpoint.model_validate({"checkpoint": attack})
    for override in (f"{attack}=1", f"seed{attack}=1", f"seed.{attack}=1"):
        if not re.fullmatch(r"seed=+1", override):
            with pytest.raises((ValidationError, ValueError)):
                parse_overrides(RunConfig.model_validate({"overrides": [override]}).overrides)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_name_of_a_run_is_one_word(attack: str, tmp_path: Path) -> None:
    repo = project.make(tmp_path / "project") if attack == ATTACKS[0] else tmp_path
    with pytest.raises(ValueError, match="can't be the name of a run"):
        worktree.make_worktree(repo, attack, profile=None, overrides={})
    with pytest.raises(ValueError, match="is no version"):
        registry.find_version(repo, attack)
    assert not list(tmp_path.rglob("planted"))


@pytest.mark.parametrize("name", ["x..y", "x.lock", ".x", "x.", "X", "x/y", "a" * 101, "x@{1}", "x~1", "x^", "x:y", "x?", "x*", "x[", "@"])
def test_a_name_of_a_run_is_one_that_git_takes_too(name: str) -> None:
    with pytest.raises(ValueError, match="can't be the name of a run"):
        worktree.check_run_name(name)


@pytest.mark.parametrize("name", ["brave-owl-0a1b2c3d", "nightly-2026-11-21", "x", "a" * 100, "v1.2_x"])
def test_what_may_be_a_name_is_a_branch_to_git(name: str) -> None:
    assert worktree.check_run_name(name) == name
    subprocess.run(["git", "check-ref-format", "--branch", f"run/{name}"], check=True, capture_output=True)


def test_a_base_is_a_commit_and_no_option(tmp_path: Path) -> None:
    repo = project.make(tmp_path / "project")
    for base in ("--help", "--upload-pack=touch planted", "-c", "main; touch planted"):
        with pytest.raises(RuntimeError, match="rev-parse"):
            worktree.make_worktree(repo, "x", base=base, profile=None, overrides={})
        with pytest.raises(ValueError, match="is no commit of"):
            git.resolve_commit(repo, base)
    assert not list(tmp_path.rglob("planted")) and not (repo / ".runs").exists()


# --------------------------------------------------------------------------------- values, which may be any text at all


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.make(tmp_path_factory.mktemp("values") / "project")


TEXTS = [one for one in ATTACKS if one and not re.search(r"[\r\n\0]", one)]


@pytest.mark.parametrize("attack", TEXTS, ids=repr)
def test_a_value_stays_a_value(attack: str, repo: Path) -> None:
    """It goes into params.yaml and into a commit's message as it is, and is run by nothing."""
    quoted = attack.replace("'", "''")
    if "${" in attack:  # DVC or a shell would fill it in
        with pytest.raises(ValueError, match=r"the override profile holds \$\{"):
            RunConfig(overrides=[f"profile='{quoted}'"])
        return
    changes = parse_overrides(RunConfig(overrides=[f"profile='{quoted}'"]).overrides)
    assert changes == {"profile": attack}
    root = worktree.make_worktree(repo, f"x{TEXTS.index(attack)}", profile=None, overrides=changes)
    assert project.git(root, "show", "HEAD:params.yaml").count("touch planted") == attack.count("touch planted")
    assert attack in project.git(root, "log", "-1", "--format=%B")
    if attack in TEXTS[:2]:
        project.dvc(root, "repro", "-q", "prepare")
    assert not list(repo.rglob("planted"))


def interpolated() -> list[str]:
    """Parameters that dvc.yaml puts into commands, where a shell reads them."""
    return sorted(set(re.findall(r"\$\{([\w.]+)\}", (ROOT / "dvc.yaml").read_text())))


def test_there_are_parameters_in_commands() -> None:
    assert "start.stage2" in interpolated()


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_parameter_that_stands_in_a_command_is_one_word(attack: str, tmp_path: Path) -> None:
    """`cf validate`, the first thing a run does, refuses it; so does the first stage."""
    for name in interpolated():
        stated = read_yaml(ROOT / "params.yaml")
        *above, last = name.split(".")
        section = stated
        for part in above:
            section = section[part]
        section[last] = attack
        if attack in HARMLESS and name == "start.stage2":
            continue
        with pytest.raises(Exception, match=name.replace(".", r"\.")):
            load.validate_params(stated, tmp_path / "params.yaml")


# ------------------------------------------------------------------------------------------------- a server's own checks


def ask(flow: Any, parameters: list[dict[str, Any]]) -> list[int]:
    """What the API answers to whoever asks for a run with these; 0 for a run."""

    async def each() -> list[int]:
        deployment = await (await flow.ato_deployment(name="x", work_pool_name=None)).aapply()
        codes = []
        async with get_client() as client:
            for stated in parameters:
                try:
                    await client.create_flow_run_from_deployment(deployment, parameters=stated)
                    codes.append(0)
                except PrefectHTTPStatusError as error:
                    codes.append(error.response.status_code)
        return codes

    return asyncio.run(each())


def test_the_server_refuses_a_command_before_there_is_a_run(server: None) -> None:
    forms = [{"config": {"stages": [attack]}} for attack in ATTACKS]
    forms += [{"config": {"from_stage": attack}} for attack in ATTACKS]
    forms += [{"config": {"overrides": [f"{attack}=1"]}} for attack in ATTACKS]
    forms += [{"config": {"profile": attack}} for attack in ATTACKS]
    assert set(ask(pipeline.pipeline, forms)) == {409}
    assert ask(pipeline.pipeline, [{"config": {"overrides": ["seed=1"]}}]) == [0]
    places = [{"config": {"checkpoint": attack}} for attack in ATTACKS if attack not in HARMLESS]
    assert set(ask(evaluate.evaluate, places)) == {409}
    assert set(ask(nightly.nightly, [{"date": attack} for attack in ATTACKS if attack])) == {409}  # an empty field is today
