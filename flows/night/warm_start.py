"""What a night begins with: the promoted student's weights as DVC data, and on warm nights all that was made for it before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from flows.project import dvc_graph, dvc_lock, dvc_remote, overrides
from flows.project.git import git
from flows.project.registry import WEIGHTS, Version
from flows.run.stage_task import environment

CODEC = "models/codec"
POINTER = "promoted.dvc"
STUDENT, ITS_CODEC = "promoted/student", "promoted/codec"
START, FRESH = "start.stage2", "models/stage1"

Line = Callable[[str], None]


def bring(repo: Path, root: Path, version: Version, line: Line) -> None:
    """The promoted weights and their codec into promoted/, by a promoted.dvc that names them: out of the cache, or from the remote.

    Nothing is stored twice: the md5s are those of the version's own dvc.lock.
    """
    outs = [
        {**{key: value for key, value in dvc_lock.entry(repo, version.commit, path).items() if key != "path"}, "path": place}
        for path, place in ((WEIGHTS, STUDENT), (CODEC, ITS_CODEC))
    ]
    said = f"# {version.tag}, by flows/night/warm_start.py\n"
    (root / POINTER).write_text(said + yaml.safe_dump({"outs": outs}, sort_keys=False))
    restore(root, [POINTER], line)


def start(repo: Path, root: Path, version: Version, keep: list[str], line: Line) -> None:
    """Stage 2 begins as the promoted student; the stages in `keep` stay as they were when it was made, and are frozen so that DVC
    lets them be. All of it is in the worktree's dvc.yaml, params.yaml and dvc.lock: `dvc repro` at the night's commit repeats it."""
    bring(repo, root, version, line)
    git(root, "checkout", "--quiet", version.commit, "--", "dvc.lock")
    outs = dvc_lock.here(root)
    paths = [out["path"] for stage in keep for out in outs.get(stage, [])]
    in_git = git(root, "ls-tree", "-r", "--name-only", version.commit, "--", *paths).splitlines()
    if in_git:  # metrics, which git holds instead of DVC
        git(root, "checkout", "--quiet", version.commit, "--", *in_git)
    restore(root, keep, line)
    dvc_graph.freeze(root, keep)
    overrides.lay(root / "params.yaml", {START: STUDENT})


def fresh(root: Path, keep: list[str]) -> None:
    """A full night: also where a warm night's branch was merged into the tracked one."""
    if frozen := [stage.name for stage in dvc_graph.stages(root) if stage.frozen]:
        dvc_graph.freeze(root, frozen, False)
    overrides.lay(root / "params.yaml", {START: FRESH})


def can_be_kept(repo: Path, root: Path, version: Version, keep: list[str]) -> str | None:
    """Why not, if not: then the night is a full one."""
    made = dvc_lock.at(repo, version.commit)
    stated = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for stage in keep:
        if stage not in made:
            return f"{stage} was not there when {version.name} was made"
        if stage not in stated:
            return f"dvc.yaml has no {stage}, which nightly.keep names"
    return None


def restore(root: Path, targets: list[str], line: Line) -> None:
    """From the cache; what it lacks, from the remote."""
    done = _ask(root, "checkout", "--force", *targets)
    if done.returncode:
        line(f"the cache lacks some of {', '.join(targets)}; asking the remote")
        dvc_remote.pull(root, targets=targets, line=line)
    if missing := [f"{name}: {out['path']}" for name, outs in dvc_lock.here(root).items() if name in targets for out in outs
                   if not (root / out["path"]).exists()]:  # fmt: skip
        raise RuntimeError(f"{missing[0]} is neither in the DVC cache nor at the remote, so the night can't begin with it")


def dvc(root: Path, *words: str) -> None:
    done = _ask(root, *words)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"`dvc {' '.join(words[:2])}` failed: {said[-1]}")


def _ask(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *words]
    surroundings = environment("nightly", root, root)
    return subprocess.run(command, cwd=root, env=surroundings, stdin=subprocess.DEVNULL, capture_output=True, text=True)
