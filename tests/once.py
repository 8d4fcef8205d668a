"""What is made once for all tests, by whichever worker needs it first, and copied by the others."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

SHARED = "SHARED_BY_TESTS"  # not CF_...: tests take those out of the environment


def shared_folder() -> Path:
    """One for all workers of a session: who began the session names it to the others in the environment, and removes it."""
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix=f"cf-tests-{os.getpid()}-")
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(os.environ[SHARED], ignore_errors=True) if os.getpid() == owner else None)
    return Path(os.environ[SHARED])


def session_lives() -> bool:
    """Whether the process that began the session is still there; one that was killed leaves the folder behind."""
    return shared_folder().exists() and Path(f"/proc/{shared_folder().name.split('-')[2]}").exists()


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills. Nobody may change what is in it. One that was left half made is made again."""
    folder = shared_folder() / name
    with (shared_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shared_folder() / f"{name}.done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def copy_of(name: str, make: Callable[[Path], object], folder: Path) -> Path:
    """A copy of what is made once, at `folder`, with its times and its links."""
    shutil.copytree(made_once(name, make), folder, symlinks=True, dirs_exist_ok=True)
    return folder
