"""A checkout of its own for a run: parameters typed and committed, the cache shared, names that are names, old folders gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.project import dvc_graph, git, overrides, run_lock, worktree
from flows.run.config import RunConfig, parse_overrides
from tests.flows import project

RAN = ("Running stage", "ERROR")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run once, with dvc.lock committed."""
    root = project.make(tmp_path_factory.mktemp("worktrees") / "project", seconds=0.2)
    project.dvc(root, "repro", "-q")
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "made")
    return root


def test_a_run_has_its_own_parameters_and_everybodys_cache(repo: Path) -> None:
    before = project.git(repo, "rev-parse", "HEAD"), (repo / "params.yaml").read_bytes()
    folder = worktree.make_worktree(repo, "a-run", profile="smoke", overrides={"slow.rate": 3e-6, "last.times": 4, "last.fail": False})
    assert folder == repo / ".runs/a-run"
    text = (folder / "params.yaml").read_text()
    assert "# a comment that stays" in text and "profile: smoke" in text and "rate: 3.0e-06" in text and "times: 4" in text
    assert project.git(folder, "status", "--porcelain") == ""
    assert project.git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip() == "run/a-run"
    said = "run a-run: profile smoke, slow.rate=3e-06, last.times=4, last.fail=False"
    assert project.git(folder, "log", "-1", "--format=%s").strip() == said
    assert (project.git(repo, "rev-parse", "HEAD"), (repo / "params.yaml").read_bytes()) == before, "the user's own tree is as it was"
    said = project.dvc(folder, "repro", "--single-item", "prepare")
    assert "is cached - skipping run" in said, "made in the user's checkout, restored here: one cache"


def test_experiments_of_dvc_work_in_a_worktree(repo: Path) -> None:
    folder = worktree.make_worktree(repo, "experiments", profile=None, overrides={})
    assert "Running stage 'last'" in project.dvc(folder, "exp", "run", "--temp", "--name", "nine", "-S", "last.times=9")
    assert "\nnine," in project.dvc(folder, "exp", "show", "--csv")
    project.dvc(folder, "exp", "apply", "nine")
    assert "times: 9" in (folder / "params.yaml").read_text() and project.git(repo, "for-each-ref", "refs/exps/*/*/nine")
    assert "Running stage" not in project.dvc(folder, "repro")


def test_a_run_that_is_retried_finds_its_folder(repo: Path) -> None:
    first = worktree.make_worktree(repo, "retried", profile=None, overrides={"seed": 5})
    (first / "work.partial").write_text("a checkpoint")
    commits = project.git(first, "log", "--format=%h")
    assert worktree.make_worktree(repo, "retried", profile=None, overrides={"seed": 5}) == first
    assert (first / "work.partial").exists() and project.git(first, "log", "--format=%h") == commits
    (first / ".git").unlink()  # as when the first was killed while it was made
    os.utime(first, (0, 0))
    again = worktree.make_worktree(repo, "retried", profile=None, overrides={"seed": 5})
    assert worktree.list_worktrees(repo)[0] == again, "used last, removed last"
    assert (again / ".git").is_file() and project.git(again, "rev-parse", "--abbrev-ref", "HEAD").strip() == "run/retried"
    assert project.git(again, "log", "--format=%h") == commits


def test_a_refused_value_leaves_nothing_half_written(repo: Path) -> None:
    folder = worktree.make_worktree(repo, "refused", profile=None, overrides={})
    with pytest.raises(ValueError, match=r"seed is 'x'; it must be a whole number, as 1 is now"):
        worktree.make_worktree(repo, "refused", profile="smoke", overrides={"last.times": 3, "seed": "x"})
    assert project.git(folder, "status", "--porcelain") == "" and "profile: tiny" in (folder / "params.yaml").read_text()


def test_a_profile_that_is_not_there_is_one_sentence(repo: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^cf profile: profile large isn't in profiles/; known are smoke, tiny$"):
        worktree.make_worktree(repo, "large", profile="large", overrides={})


def test_secrets_of_the_checkout_do_not_go_along(repo: Path) -> None:
    file = repo / ".dvc/config.local"
    file.write_text(
        "[core]\n    remote = s3\n['remote \"s3\"']\n    url = s3://bucket\n    endpointurl = http://me:hidden@127.0.0.1:1\n"
        "    access_key_id = AKIA\n    secret_access_key = hidden\n    credentialpath = ~/.aws/credentials\n"
    )
    try:
        folder = worktree.make_worktree(repo, "quiet", profile=None, overrides={})
    finally:
        file.unlink()
    text = (folder / ".dvc/config.local").read_text()
    assert "hidden" not in text and "AKIA" not in text
    assert "s3://bucket" in text and "credentialpath" in text and f'"{repo}/.dvc/cache"' in text
    assert project.git(folder, "status", "--porcelain") == "", "git doesn't see it"


@pytest.mark.parametrize("name", ["", "-x", "a b", "a;b", "$(id)", "../x", "a/b", "A", "a..b", "x.lock", "a\n", "é", "a" * 101, ".a", "a-"])
def test_a_name_that_is_more_than_a_name_is_refused(repo: Path, name: str) -> None:
    with pytest.raises(ValueError, match="can't be the name of a run"):
        worktree.make_worktree(repo, name, profile=None, overrides={})
    assert not (repo / ".runs" / (name or "nothing")).exists()


def test_good_names_are_taken() -> None:
    for name in ("a", "amber-fox-1b2c3d4e", "nightly-2026-11-21", "v1.2_3"):
        assert worktree.check_run_name(name) == name
        assert subprocess.run(["git", "check-ref-format", "--branch", f"run/{name}"], capture_output=True).returncode == 0


def test_a_base_that_is_an_option_is_no_base(repo: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        worktree.make_worktree(repo, "based", base="--output=/tmp/x", profile=None, overrides={})


# ---------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-6", 2e-6),
        ("4", 4),
        ("none", "none"),
        ("null", None),
        ("[1, 2.5]", [1, 2.5]),
        ("off", "off"),
        ("true", True),
        ('"4"', "4"),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_read_by_the_rules_of_params_yaml(text: str, value: Any) -> None:
    (found,) = parse_overrides([f"a.b_c={text}"]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "one", ["a", "=1", "a b=1", "a.=1", "a=", "a=1\nb", "-a=1", "$(id)=1", "a=[1", "a={b: ", "a;b=1", "a=${b}", "a=${oc.env:HOME}"]
)
def test_what_is_not_key_value_is_refused_by_the_form(one: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig(overrides=[one])


def test_the_form_has_types_bounds_and_no_other_keys() -> None:
    for bad in (
        {"profile": "x"},
        {"at_once": 0},
        {"at_once": 17},
        {"stages": ["a b"]},
        {"from_stage": "-x"},
        {"to_stage": "$(id)"},
        {"more": 1},
    ):
        with pytest.raises(ValidationError):
            RunConfig(**bad)
    with pytest.raises(ValidationError, match="seed is stated twice"):
        RunConfig(overrides=["seed=1", "seed=2"])
    assert RunConfig(stages=["evaluate@short", "raw.dvc", "sub/dvc.yaml:made"]).stages[2] == "sub/dvc.yaml:made"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("slow.rat", 1, "slow.rat is not a parameter of params.yaml; did you mean slow.rate?"),
        ("zzz", 1, "zzz is not a parameter of params.yaml; known sections are profile, seed, slow, stubborn, last"),
        ("seed.more", 1, "seed.more is not a parameter"),
        ("slow.rate", "fast", "slow.rate is 'fast'; it must be a number, as 2e-06 is now"),
        ("seed", 1.5, "seed is 1.5; it must be a whole number, as 1 is now"),
        ("seed", True, "seed is True; it must be a whole number"),
        ("last.fail", 1, "last.fail is 1; it must be true or false, as False is now"),
        ("profile", 3, "profile is 3; it must be a word, as 'tiny' is now"),
        ("slow", 3, "slow is 3; it must be a section"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(repo: Path, tmp_path: Path, key: str, value: Any, said: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes((repo / "params.yaml").read_bytes())
    with pytest.raises(ValueError) as error:
        overrides.apply_overrides(file, {"last.times": 9, key: value})
    assert str(error.value).startswith(said)
    assert file.read_bytes() == (repo / "params.yaml").read_bytes()


def test_numbers_stay_numbers_for_every_reader(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "params.yaml"
    file.write_text("a: 1.0e-3\nb: null\nc: [1]\n")
    overrides.apply_overrides(file, {"a": 2, "b": 1e-7, "c": [1e-9, 2]})
    assert yaml.safe_load(file.read_text()) == {"a": 2.0, "b": 1e-7, "c": [1e-9, 2]}


# ------------------------------------------------------------------------------------------------ one run, and old ones


def test_one_run_a_checkout(repo: Path) -> None:
    folder = worktree.make_worktree(repo, "busy", profile=None, overrides={})
    assert not run_lock.is_in_use(folder)
    with run_lock.hold_checkout(folder, "an-id"):
        assert run_lock.is_in_use(folder) and run_lock.find_dead_run(folder) == ""
        busy = pytest.raises(run_lock.CheckoutBusy, match=r"is in use by another run, process \d+; wait for it")
        with busy, run_lock.hold_checkout(folder):
            pass
    assert not run_lock.is_in_use(folder) and run_lock.find_dead_run(folder) == ""
    with pytest.raises(ValueError), run_lock.hold_checkout(folder, "an-id"):
        raise ValueError
    assert run_lock.find_dead_run(folder) == "", "it ended by itself"
    with pytest.raises(KeyboardInterrupt), run_lock.hold_checkout(folder, "an-id"):
        raise KeyboardInterrupt
    assert run_lock.find_dead_run(folder) == "an-id"


def test_old_folders_go_and_their_branches_stay(tmp_path: Path) -> None:
    repo = project.make(tmp_path / "project")
    folders = [worktree.make_worktree(repo, f"run-{number}", profile=None, overrides={"seed": number + 2}) for number in range(5)]
    project.dvc(folders[0], "repro", "-q", "prepare")  # and then its run was killed
    os.utime(folders[0], (0, 0))
    (folders[1] / ".git").write_text("gitdir: /nowhere\n")  # as when the checkout was moved
    said: list[str] = []
    with run_lock.hold_checkout(folders[2]):
        assert worktree.prune_worktrees(repo, keep=1, line=said.append) == [folders[3], folders[0]]
    assert [folder.exists() for folder in folders] == [False, True, True, False, True]
    assert len(said) == 1 and said[0].startswith("run-1 was not removed: `git add")
    assert "prepare" in project.git(repo, "show", "run/run-0:dvc.lock"), "what it had finished"
    assert worktree.prune_worktrees(repo, keep=1) == [folders[2]]
    assert project.git(repo, "show", "run/run-2:params.yaml").count("seed: 4") == 1
    again = worktree.make_worktree(repo, "run-2", profile=None, overrides={"seed": 4})
    assert again.exists() and "seed: 4" in (again / "params.yaml").read_text()
    command = [sys.executable, "-m", "flows.project.worktree", "list"]
    done = subprocess.run(command, cwd=repo, env=project.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3


def test_what_git_is_told_for_people_does_not_end_a_run(tmp_path: Path) -> None:
    """Commits that must be signed, and a hook, as `dvc install` writes them."""
    repo = project.make(tmp_path / "project")
    for key, value in (("commit.gpgsign", "true"), ("tag.gpgsign", "true"), ("gpg.program", "/bin/false")):
        project.git(repo, "config", key, value)
    for name in ("post-checkout", "pre-commit", "post-commit"):
        hook = repo / ".git/hooks" / name
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    folder = worktree.make_worktree(repo, "plain", profile="smoke", overrides={})
    assert "profile: smoke" in project.git(folder, "show", "HEAD:params.yaml")
    git.run_git(repo, "tag", "--annotate", "--message", "a version", "student@v0.0.1")


def test_a_checkout_that_was_cut_off_is_made_whole(repo: Path) -> None:
    folder = worktree.make_worktree(repo, "cut", profile=None, overrides={"seed": 7})
    (folder / "work.py").unlink()
    (folder / "metrics/last.json").unlink()  # as DVC does before it runs the stage
    worktree.make_worktree(repo, "cut", profile=None, overrides={"seed": 7})
    assert (folder / "work.py").exists() and not (folder / "metrics/last.json").exists()


def test_the_worktrees_are_no_part_of_the_project_around_them(repo: Path) -> None:
    worktree.make_worktree(repo, "inner", profile=None, overrides={})
    assert project.git(repo, "status", "--porcelain", "--", ".runs") == ""
    assert [stage.name for stage in dvc_graph.read_graph(repo)] == project.STAGES
