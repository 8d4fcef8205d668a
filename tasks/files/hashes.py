"""Hashes of what files and folders contain: one for keys of the runner and of caches, and the md5 that DVC writes into dvc.lock.

Each file is read once a process, however often its hash is asked for, as long as its inode, size and time stay: the runner hashes
all that a stage depends on before the stage starts, and tasks/wandb_log names the same files to W&B afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path


def hash_content(path: Path) -> str:
    """Return the md5 of a file's bytes, or of the names and contents below a folder; "absent" where nothing is."""
    if path.is_dir():
        listing = "".join(f"{file.relative_to(path).as_posix()} {hash_content(file)}\n" for file in list_files(path))
        return _hash_text(listing)
    return _hash_file_once(path) if path.exists() else "absent"


def compute_dvc_md5(path: Path, *, again: bool = False) -> str:
    """Return the md5 that dvc.lock has for a file or folder: a folder's is the md5 of its listing as JSON, and ends with .dir.

    "absent" where nothing is. `again`: read every byte again, because a damaged file may have kept its time and size.
    """
    hash_one: Callable[[Path], str] = hash_file if again else _hash_file_once
    if not path.is_dir():
        return hash_one(path) if path.exists() else "absent"
    files = {file.relative_to(path).as_posix(): file for file in list_files(path)}
    listing = [{"md5": hash_one(files[name]), "relpath": name} for name in sorted(files)]
    return _hash_text(json.dumps(listing, sort_keys=True)) + ".dir"


def hash_file(path: Path) -> str:
    """Return the md5 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def list_files(path: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted, without Python's byte code (as .dvcignore says); of a file the file itself."""
    below = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    yield from sorted(below) if path.is_dir() else [path]


def _hash_file_once(path: Path) -> str:
    stat = path.stat()
    return _hash_known_file(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_known_file(path: Path, *identity: int) -> str:
    return hash_file(path)


def _hash_text(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
