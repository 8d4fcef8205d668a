"""Everywhere a secret could have gone: files as they are, what git and SQLite have packed, and the words in other guises."""

from __future__ import annotations

import base64
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path


def guises(secret: str) -> list[bytes]:
    """As it is, in base64 at each of the three places a byte can have in it, and half of it: a file's blocks may cut it in two."""
    encoded = [base64.b64encode(b"x" * shift + secret.encode())[4 * (shift > 0) : -4] for shift in range(3)]
    half = len(secret) // 2
    return [secret[:half].encode(), secret[half:].encode(), *encoded]


def found(folder: Path, secrets: dict[str, str]) -> list[str]:
    """Which secret is where, below the folder."""
    words = [(name, guise) for name, secret in secrets.items() for guise in guises(secret)]
    return sorted({f"{name} in {place}" for place, data in contents(folder) for name, guise in words if guise in data})


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            yield str(file.relative_to(folder)), data
            if data.startswith(b"SQLite format 3\0"):
                yield f"{file.relative_to(folder)}, as SQL", dumped(file)
        elif file.name == ".git" and file.is_dir():
            yield f"{file.relative_to(folder)}, unpacked", unpacked(file)
        elif file.is_symlink():
            yield str(file.relative_to(folder)), str(file.readlink()).encode()


def dumped(file: Path) -> bytes:
    """With what is only in its write-ahead log so far."""
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        database.text_factory = lambda data: data.decode(errors="replace")
        return "\n".join(database.iterdump()).encode(errors="replace")


def unpacked(git: Path) -> bytes:
    """Every object of every branch, and those that no branch has any more."""
    words = ["git", "--git-dir", str(git), "cat-file", "--batch-all-objects", "--batch"]
    return subprocess.run(words, capture_output=True, check=True).stdout
