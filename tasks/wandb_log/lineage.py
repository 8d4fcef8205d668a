"""Where a stage's run comes from and what it makes, in Git's and DVC's terms: commit, md5s, and the stage's inputs and outs."""

import os
import secrets
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tasks.files.atomic import write_atomically
from tasks.files.settings import read_settings
from tasks.params.project import Project


def describe_git() -> dict[str, Any]:
    """Return commit, whether tracked files differ from it, and the names of the first 50 that do.

    What a pipeline writes while it runs (dvc.lock, metrics/) is left out, because it says nothing about the code.
    """
    try:
        sha = _run_git("rev-parse", "HEAD").strip()
        changed = _run_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock", ":(exclude)metrics")
    except (OSError, subprocess.CalledProcessError):
        return {"sha": None, "dirty": None}
    names = [line[3:] for line in changed.splitlines()]
    return {"sha": sha, "dirty": bool(names)} | ({"changed": names[:50]} if names else {})


def describe_origin(work: Path) -> dict[str, str]:
    """Return the run and the commit of a stage, as its runtime facts and the report's card show them; no commit where Git has none."""
    git = describe_git()
    commit = f"{git['sha']}{' with uncommitted changes' if git['dirty'] else ''}"
    return {"run": name_pipeline_run(work)} | ({"commit": commit} if git["sha"] else {})


def _run_git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def list_inputs(stage: str, project: Project) -> list[Path]:
    """List what a stage reads of other stages' outs and of data that a .dvc file names; the whole out where it reads a part."""
    others = [out for name in project.stages if name != stage for out in list_outs(project.stage(name))]
    inputs: list[Path] = []
    for dep in map(Path, project.stage(stage).get("deps", [])):
        tracked = next((out for out in others if dep.is_relative_to(out)), None)
        if tracked is None and dep.with_name(dep.name + ".dvc").exists():
            tracked = dep
        if tracked is not None and tracked.exists():
            inputs.append(tracked)
    return list(dict.fromkeys(inputs))


def list_outs(entry: Mapping[str, Any]) -> list[Path]:
    """List the paths of a stage's `outs`; `metrics` are left out, because their values are in the run itself."""
    return [Path(out if isinstance(out, str) else next(iter(out))) for out in entry.get("outs", [])]


def name_pipeline_run(work: Path) -> str:
    """Return the name shared by all stages of one command: CF_RUN, DVC's name of the experiment, or one drawn for the process group.

    A drawn name is stored in `work`/run with the group's number and start, because the system uses numbers of groups again.
    """
    if stated := read_settings().run or os.environ.get("DVC_EXP_NAME"):
        return stated
    file, group = work / "run", os.getpgrp()
    try:  # exact to a few seconds only, because the system's clock is corrected now and then
        start = float(psutil.Process(group).create_time())
    except psutil.Error:  # the group's first process has ended
        start = 0.0
    match file.read_text().split() if file.exists() else []:
        case [owner, since, name] if owner == str(group) and (not start or abs(start - float(since)) < 10):
            return name
    name = f"{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{group} {start:.2f} {name}", shared=True)
    return name
