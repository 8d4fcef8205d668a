"""A given checkpoint, measured: a flow that puts it in the place of a stage's model and makes the videos, the numbers and the report.

It happens in a worktree of its own, on whose branch the stage is frozen and dvc.lock names the checkpoint: `dvc repro` at that
commit repeats it, and nobody takes the model for one that the stage made.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from ruamel.yaml import YAML

from flows.machine import reconcile
from flows.project import dvc_graph, git, run_lock, worktree
from flows.project.dvc_graph import Stage
from flows.run.config import Override, Profile, StageName, parse_overrides
from flows.run.frame import commit_results, name_run, run_framed
from flows.run.repro import check_parameters, repro_stages

# letters that git takes in a tag and a folder's name has: no option, no shell
PLACE_PATTERN = r"^[A-Za-z0-9_./~][A-Za-z0-9_./@#~+-]{0,300}$"


class Checkpoint(BaseModel):
    """Which checkpoint, and what is measured."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Annotated[str, StringConstraints(pattern=PLACE_PATTERN)] = Field(
        description="A folder of the worker's machine, such as models/stage2 elsewhere, or a version, tag or commit: student@v0.0.1."
    )
    stage: StageName = Field("stage2", description="The stage whose model it takes the place of.")
    measured: list[StageName] = Field(
        ["generate", "evaluate", "report"], min_length=1, max_length=20, description="The stages that run with it."
    )
    profile: Profile = Field("params.yaml", description="The parameters to start from.")
    overrides: list[Override] = Field(
        default_factory=list, max_length=50, description="Values laid over them, for example generate.prompts=8."
    )

    @field_validator("overrides")
    @classmethod
    def _readable(cls, stated: list[str]) -> list[str]:
        parse_overrides(stated)
        return stated


@flow(name="evaluate", on_crashed=[reconcile.close_tasks], on_cancellation=[reconcile.close_tasks])
def evaluate(config: Checkpoint) -> dict[str, str] | State[Any]:
    """The checkpoint's videos and numbers, beside those of the other systems, which come from the cache where they are there."""
    return run_framed(lambda: _measure_checkpoint(config))


def _measure_checkpoint(config: Checkpoint) -> dict[str, str]:
    repo, run = Path.cwd().resolve(), name_run()
    root = worktree.make(repo, run, profile=config.profile, overrides=parse_overrides(config.overrides))
    with run_lock.alone(root, str(runtime.flow_run.id)):
        check_parameters(root)
        known = dvc_graph.stages(root)
        chosen = dvc_graph.selected(known, config.measured)
        before = stages_before(known, [stage.name for stage in chosen], config.stage)
        states = repro_stages(root, only=before, run=run, repo=repo) if before else {}
        place_checkpoint(repo, root, config.checkpoint, config.stage, [stage.name for stage in chosen])
        states |= repro_stages(root, only=[stage.name for stage in chosen], run=run, repo=repo)
        commit_results(repo, root, run, f"{config.checkpoint} as {config.stage}, measured")
        get_run_logger().info(f"its report is {root}/reports/report.html")
        return states


def stages_before(known: list[Stage], measured: list[str], given: str) -> list[str]:
    """Stages that must be there first. None may be made from the model whose place is taken: it would be of another model."""
    before = {stage.name for last in measured for stage in dvc_graph.selected(known, (), None, last)} - {*measured, given}
    if from_it := [stage.name for stage in dvc_graph.selected(known, (), given) if stage.name in before]:
        way = f"add {', '.join(from_it)} to what is measured, or name {from_it[-1]} as the stage"
        raise ValueError(f"{from_it[0]} is made from {given}; {way}")
    return [stage.name for stage in known if stage.name in before]


@task(name="put the checkpoint in its place", task_run_name="put the checkpoint in its place", cache_policy=NO_CACHE)
def place_checkpoint(repo: Path, root: Path, checkpoint: str, stage: str, measured: list[str]) -> None:
    """Its files are now what dvc.lock says that the stage made, and the stage is frozen."""
    known = YAML(typ="safe", pure=True).load(root / "dvc.yaml")["stages"]
    out = find_model_folder(known, stage)
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / ".dvc/tmp") as temporary:
        found, rev = fetch_checkpoint(repo, checkpoint, out, Path(temporary) / "model")
        place = root / out
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(found, place)
    for dep in {dep for one in measured for dep in known.get(one, {}).get("deps", []) if Path(dep).is_relative_to(out)}:
        if not (root / dep).exists():
            raise ValueError(f"{checkpoint} has no {Path(dep).relative_to(out)}, which {', '.join(measured)} read; measure fewer stages")
    # numbers of another training would be taken for those of this one
    for file in _out_paths(known[stage], "metrics"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(git.git(repo, "show", f"{rev}:{file}") if rev else "{}\n")
    dvc_graph.freeze(root, [stage])
    dvc(root, "commit", "--force", "--no-relink", stage)
    files = [file for file in place.rglob("*") if file.is_file()]
    get_run_logger().info(f"{out} is {checkpoint}: {len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")


def _out_paths(stage: dict[str, Any], kind: str) -> list[str]:
    return [out if isinstance(out, str) else next(iter(out)) for out in stage.get(kind, [])]


def find_model_folder(known: dict[str, Any], stage: str) -> str:
    """The one folder that a stage makes and the cache holds."""
    if stage not in known:
        raise ValueError(f"{stage} is no stage; known are {', '.join(known)}")
    names = _out_paths(known[stage], "outs")
    models = [out for out in names if Path(out).parts[0] == "models"]
    if len(models) != 1:
        raise ValueError(f"{stage} makes {', '.join(names) or 'nothing'}, and no single folder in models/; name a stage that makes a model")
    return models[0]


def fetch_checkpoint(repo: Path, checkpoint: str, out: str, into: Path) -> tuple[Path, str | None]:
    """The folder as it is, or out of the cache what a commit's dvc.lock names; without a cached copy, from the remote; and that commit."""
    folder = Path(checkpoint).expanduser()
    folder = folder if folder.is_absolute() else repo / folder
    if folder.is_dir():
        files = list(folder.rglob("*"))
        if odd := next((file for file in files if file.is_symlink() or not (file.is_file() or file.is_dir())), None):
            raise ValueError(f"{odd} is a link or no plain file; a checkpoint is a folder of plain files")
        if not any(file.is_file() for file in files):
            raise ValueError(f"{folder} is empty; name the folder that holds the model's files, such as models/stage2")
        return folder, None
    try:
        rev = git.git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{checkpoint}^{{commit}}").strip()
    except RuntimeError:
        raise ValueError(f"{checkpoint} is neither a folder in {repo} nor a version, tag or commit; `cf history` lists versions") from None
    dvc(repo, "get", ".", out, "--rev", rev, "--out", str(into))
    return into, rev


def dvc(root: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise RuntimeError(f"`dvc {words[0]}` failed: {' '.join(said)[-500:]}")
