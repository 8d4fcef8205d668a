"""DVC's record of its running commands, .dvc/tmp/rwlock, mended where a kill or a full disk has left it empty or torn.

DVC writes this file in place, and every later command of DVC fails where it can't read it (treeverse/dvc, dvc/rwlock.py).
"""

import fcntl
import json
import re
from contextlib import suppress
from pathlib import Path

import psutil


def mend_rwlock(root: Path, *, only_look: bool = False) -> str:
    """Remove the record of a checkout if DVC can't read it; return a sentence about a torn record, or "" for one that is whole.

    It stays where a dvc lives in that checkout, because that one's own entry is lost and its end must not be mistaken for another's.
    """
    folder = root / ".dvc/tmp"
    file = folder / "rwlock"
    if _is_whole(file):
        return ""
    with (folder / "rwlock.lock").open("a") as guard:  # the lock that DVC holds while it writes the record
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        if _is_whole(file):
            return ""
        torn = f"{file} is torn, as a kill or a full disk leaves it"
        if alive := find_dvc(root):
            return f"{torn}, and dvc is at work there (process {', '.join(map(str, alive))}); wait for its end"
        if only_look:
            return f"{torn}, and no dvc is at work there"
        file.unlink(missing_ok=True)
        return f"{torn}: removed, since no dvc is at work there"


def _is_whole(file: Path) -> bool:
    """Say whether DVC can read the record; one that is absent is whole."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() <= {"read", "write"} and all(isinstance(held, dict) for held in record.values())


def find_dvc(root: Path) -> list[int]:
    """Return the numbers of this user's processes that run DVC in a checkout, and not in a worktree below it."""
    root, found = root.resolve(), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(re.fullmatch(r"(.*/)?dvc", word) for word in process.cmdline()[:4]):
                here = Path(process.cwd())
                if next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None) == root:
                    found.append(process.pid)
    return found
