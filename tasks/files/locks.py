"""File locks that the kernel frees when the last process that has the file open dies, kill -9 included.

Where a lock only has to exclude, `filelock.FileLock` is used directly (flows/nightly.py, flows/machine/up.py, flows/project/registry.py).
The lock here does two things more: its file's text says which process or run holds it or held it last, and a child process that
inherits the open file keeps it locked.
"""

import fcntl
from pathlib import Path
from typing import IO


def try_lock(path: Path, *, shared: bool = False) -> IO[str] | None:
    """Lock an existing file without waiting; return it open, or None while another process holds it. Closing it frees it.

    `shared`: hold the lock together with other readers, to look whether it is free. Never remove such a file, because a process
    that has the removed file open would hold a lock that no other process can see.
    """
    file = path.open("r" if shared else "r+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def write_holder(file: IO[str], text: str) -> None:
    """Replace the text of a file that `try_lock` has locked."""
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def read_holder(path: Path) -> tuple[bool, str]:
    """Return whether a process holds the lock, and the text of its file; a file that is absent is free and empty."""
    try:
        if file := try_lock(path, shared=True):
            with file:
                return False, file.read()
        return True, path.read_text()
    except FileNotFoundError:
        return False, ""
