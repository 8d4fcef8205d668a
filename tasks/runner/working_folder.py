"""A stage's folder for checkpoints, work/<stage>/<key>: found again after a kill, and never used by two processes at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.files.hashes import hash_content
from tasks.params.project import Project
from tasks.params.yaml_file import Refused, value_at

WORK = Path("work")
USER_FILES = ("folder", "prompts_file")  # parameters that are paths of the user's own files


def compute_key(stage: str, paths: Mapping[str, Any], project: Project) -> str:
    """Hash everything that the stage's result depends on: command, contents of its dependencies, values of its parameters."""
    entry = project.stage(stage)
    deps = [Path(dep) for dep in entry.get("deps", [])]
    inputs = [value for name, value in paths.items() if name != "out" and isinstance(value, Path)]
    deps += [path for path in inputs if not any(path.is_relative_to(dep) or dep.is_relative_to(path) for dep in deps)]
    # A file that a parameter names is no dependency of DVC's. A killed run must still not continue with another file's results.
    section = project.tree.get(stage, {})
    deps += [Path(section[name]) for name in USER_FILES if isinstance(section, Mapping) and section.get(name)]
    parts = {
        "command": sorted(f"--{name} {value}" for name, value in paths.items()),
        "deps": {str(dep): hash_content(dep) for dep in sorted(deps)},
        "params": dict(_select_params(entry.get("params", []), project.tree)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _select_params(entries: list[Any], tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Look up dvc.yaml's `params`: dotted keys, or {file: keys}, where no keys means the whole file."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry, value_at(tree, entry)
        else:
            for keys in entry.values():
                yield from _select_params(list(keys or tree), tree)


@contextmanager
def open_working_folder(stage: str, key: str) -> Iterator[tuple[Path, bool]]:
    """Lock work/<stage>/<key>, and yield it with whether an earlier process left files there. Refused if it is in use.

    The lock holds our process id. The kernel frees it when the process ends, also by kill -9.
    """
    work = WORK / stage / key
    lock = work / "lock"
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a+")
        except FileNotFoundError:  # a stage that has just succeeded removed the folder between the two lines
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise Refused(f"{work} is in use by process {owner}; wait for it to end, or end it, and start again") from None
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # the file that we locked was removed meanwhile, and another process may have made it anew
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield work, any(path != lock for path in work.iterdir())
            return
