"""The mark of a run that W&B's server may lack: a file in the run's folder, locked as long as the stage's process lives."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

MARK = "unsent"


def mark_unsent(folder: Path) -> IO[str]:
    """Create the mark and return it, open and locked. The kernel releases the lock when the process ends, also by kill -9."""
    file = (folder / MARK).open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def is_marked(folder: Path) -> bool:
    """Return whether the mark is there: the run lives, was killed, or ended before the server had taken all of it."""
    return (folder / MARK).exists()


def is_running(folder: Path) -> bool:
    """Return whether the process that writes the run lives."""
    try:
        with (folder / MARK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
