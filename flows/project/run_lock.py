"""The lock that lets one run at a time use a checkout, and tells which run died while it held the checkout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.files.locks import read_holder, try_lock, write_holder

LOCK = ".dvc/tmp/cf-run.lock"  # its text is "PROCESS RUN" while a run has the checkout, and empty after the run has ended


class CheckoutBusy(RuntimeError):
    """Another run has the checkout."""


@contextmanager
def hold_checkout(root: Path, run: str = "") -> Iterator[None]:
    """Hold an exclusive lock on the checkout. Raises CheckoutBusy, because DVC itself refuses a stage that already runs only hours later.

    If the process dies, the kernel frees the lock but the run's id stays in the file; `find_dead_run` reads it there.
    """
    path = root / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = try_lock(path)
    if not file:
        owner = path.read_text().split(" ")[0] or "unknown"
        raise CheckoutBusy(f"{root} is in use by another run, process {owner}; wait for it, or give this one a worktree")
    with file:
        write_holder(file, f"{os.getpid()} {run}")
        try:
            yield
        except Exception:  # the run ends by itself; what ends the process (KeyboardInterrupt) leaves the id
            write_holder(file, "")
            raise
        write_holder(file, "")


def is_in_use(root: Path) -> bool:
    """Say whether a run holds the checkout."""
    return read_holder(root / LOCK)[0]


def find_dead_run(root: Path) -> str:
    """Return the id of the run that died while it held the checkout; empty if a run holds it now or the last one ended by itself."""
    held, text = read_holder(root / LOCK)
    return "" if held else text.partition(" ")[2]
