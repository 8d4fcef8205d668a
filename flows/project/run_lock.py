"""TODO: what flows.project.run_lock is for."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".dvc/tmp/cf-run.lock"


class CheckoutBusy(RuntimeError):
    """Another run has the checkout."""


@contextmanager
def hold_checkout(root: Path, run: str = "") -> Iterator[None]:
    """One run a checkout: DVC refuses a stage that is started twice, hours into the first. The kernel frees the lock, and then the
    name of the run is still in it: that one died."""
    path = root / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().split(" ")[0] or "unknown"
            raise CheckoutBusy(f"{root} is in use by another run, process {owner}; wait for it, or give this one a worktree") from None
        _write_owner(file, f"{os.getpid()} {run}")
        try:
            yield
        except Exception:  # it ends by itself, and says so
            _write_owner(file, "")
            raise
        _write_owner(file, "")


def _write_owner(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def is_in_use(root: Path) -> bool:
    return _read_owner(root) is None


def find_dead_run(root: Path) -> str:
    """The run that had this checkout and didn't leave it, if nobody has it now."""
    return (_read_owner(root) or " ").split(" ")[1]


def _read_owner(root: Path) -> str | None:
    """What a free lock says; None of one that is held."""
    if not (root / LOCK).exists():
        return " "
    with (root / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return file.read() or " "
