"""The md5 that DVC writes into dvc.lock, which is also the key of the runner and of caches.

Each file is read once a process, however often its hash is asked for, as long as its inode, size and time stay: the runner hashes
all that a stage depends on before the stage starts, and tasks/wandb_log names the same files to W&B afterwards.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

KNOWN: dict[bytes, bytes] = {}  # what a file is, hashed -> its md5: as bytes, because a collection has tens of thousands of files


def compute_dvc_md5(path: Path, *, again: bool = False) -> str:
    """Return the md5 that dvc.lock has for a file or folder: a folder's is the md5 of its listing as JSON, and ends with .dir.

    "absent" where nothing is. `again`: read every byte again, because a damaged file may have kept its time and size.
    """
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in list_files(path)}
        listing = [{"md5": compute_dvc_md5(files[name], again=again), "relpath": name} for name in sorted(files)]
        return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
    if not path.exists():
        return "absent"
    return hash_file(path) if again else _hash_known_file(path.absolute())


def _hash_known_file(path: Path) -> str:
    """Return the md5 of a file, from KNOWN if the file is there under the same name, inode, size and time."""
    stat = path.stat()
    about = b"%b %d %d %d" % (os.fsencode(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    identity = hashlib.blake2b(about, digest_size=16).digest()
    if (known := KNOWN.get(identity)) is None:
        known = KNOWN[identity] = bytes.fromhex(hash_file(path))
    return known.hex()


def hash_file(path: Path) -> str:
    """Return the md5 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def list_files(path: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted, without Python's byte code (as .dvcignore says); of a file the file itself."""
    below = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    yield from sorted(below) if path.is_dir() else [path]
