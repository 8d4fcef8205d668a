"""Where a stage's run comes from and what it makes, in Git's and DVC's terms: commit, md5s, and the outs as a chain."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tasks.files.hashes import dvc_md5, files
from tasks.params import yaml_file

KINDS = {"data": "dataset", "models": "model", "samples": "videos", "results": "evaluation", "reports": "report"}
CODE = {".py", ".j2"}
PIPELINE = Path("dvc.yaml")


@dataclass(frozen=True)
class Held:
    """A file or folder that DVC holds. Its name in W&B is the same wherever and whenever it is made."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def kind(self) -> str:
        return KINDS.get(self.path.parts[0], "output")

    @property
    def md5(self) -> str:
        return dvc_md5(self.path)

    def size(self) -> dict[str, int]:
        found = [file.stat().st_size for file in files(self.path)]
        return {"files": len(found), "bytes": sum(found)}


def git() -> dict[str, Any]:
    """Commit, and what differs from it; what a pipeline writes while it runs (dvc.lock, metrics/) says nothing about its code."""
    try:
        sha = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock", ":(exclude)metrics")
    except (OSError, subprocess.CalledProcessError):
        return {"sha": None, "dirty": None}
    names = [line[3:] for line in changed.splitlines()]
    return {"sha": sha, "dirty": bool(names)} | ({"changed": names[:50]} if names else {})


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def dvc(stage: str, stated: Mapping[str, Any], pipeline: Path = PIPELINE) -> dict[str, Any]:
    """The stage's dependencies with the md5s that dvc.lock will have for them. Taken from the files themselves: a stage
    started by hand has not told DVC. Code is left to the commit, or to its list of changes."""
    deps = [Path(dep) for dep in _stages(stated, pipeline).get(stage, {}).get("deps", [])]
    return {"stage": stage, "deps": {str(dep): dvc_md5(dep) for dep in deps if dep.suffix not in CODE}}


def used(stage: str, stated: Mapping[str, Any], pipeline: Path = PIPELINE) -> list[Held]:
    """The outs of other stages, and the data of .dvc files, that this one reads, whole even where it reads a file of one."""
    stages = _stages(stated, pipeline)
    made = [out for name, entry in stages.items() if name != stage for out in _outs(entry)]
    found: dict[Path, Held] = {}
    for dep in map(Path, stages.get(stage, {}).get("deps", [])):
        whole = next((out for out in made if dep.is_relative_to(out)), None)
        if whole is None and dep.with_name(dep.name + ".dvc").exists():
            whole = dep
        if whole is not None and whole.exists():
            found[whole] = Held(whole)
    return list(found.values())


def made(stage: str, stated: Mapping[str, Any], pipeline: Path = PIPELINE) -> list[Held]:
    """Its outs, once it has succeeded: by then they are in their places."""
    return [Held(out) for out in _outs(_stages(stated, pipeline).get(stage, {})) if out.exists()]


def pipeline_run(work: Path) -> str:
    """One name for all stages that one command runs: CF_RUN, DVC's name of the experiment, or one drawn for the process group."""
    given = os.environ.get("CF_RUN") or os.environ.get("DVC_EXP_NAME")
    if given:
        return given
    file, group = work / "run", os.getpgrp()
    began = leader_began(group)
    match file.read_text().split() if file.exists() else []:
        case [owner, since, name] if owner == str(group) and (not began or abs(began - float(since)) < 10):
            return name
    name = f"{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"
    work.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"run.{os.getpid()}")
    partial.write_text(f"{group} {began:.2f} {name}")
    partial.replace(file)
    return name


def leader_began(group: int) -> float:
    """When the first process of a group began, by which a number that is used again is told from the one before; 0 if it is gone.
    Exact to a few seconds only, since the clock that it is counted from is put right now and then."""
    try:
        return float(psutil.Process(group).create_time())
    except psutil.Error:
        return 0.0


def alias(group: str) -> str:
    """W&B forbids / and : in the aliases of an artifact."""
    return re.sub("[/:]", "-", group)


def _stages(stated: Mapping[str, Any], pipeline: Path) -> dict[str, Any]:
    return yaml_file.read_stages(pipeline, stated) if pipeline.exists() else {}


def _outs(entry: dict[str, Any]) -> Iterator[Path]:
    """Not its metrics: their values are in the run itself."""
    for out in entry.get("outs", []):
        yield Path(out if isinstance(out, str) else next(iter(out)))
