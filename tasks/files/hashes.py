"""What files and folders hold, as md5: one number for the runner's key, and the one that DVC writes into dvc.lock.

Each file is read once a process, however often it is asked for: the runner hashes all that a stage depends on before the
stage starts, and the mirror (tasks/wandb_log/run.py) names the same files to W&B afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def digest(path: Path) -> str:
    """By content: of a file, or of the names and contents below a folder. Absent is a value too."""
    if path.is_dir():
        listing = "".join(f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in files(path))
        return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest()
    if not path.exists():
        return "absent"
    about = path.stat()
    return _read(path.absolute(), about.st_ino, about.st_size, about.st_mtime_ns)


def dvc_md5(path: Path) -> str:
    """What dvc.lock says of it: a folder's is the md5 of its listing as JSON, and ends with .dir."""
    if not path.is_dir():
        return digest(path)
    names = {file.relative_to(path).as_posix(): file for file in files(path)}
    listing = [{"md5": digest(names[name]), "relpath": name} for name in sorted(names)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def files(path: Path) -> Iterator[Path]:
    """Of a folder all files below, of a file itself."""
    below = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)  # as .dvcignore says
    yield from sorted(below) if path.is_dir() else [path]


@cache
def _read(path: Path, *known_by: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
