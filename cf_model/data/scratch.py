"""What a stage must look up later and must not hold in memory: an SQLite database in a temporary file."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

CACHE_KIB = 1024  # of the file that SQLite holds in memory; small, so that memory is the same for a thousand clips and for many


def open_scratch(folder: Path | None = None) -> sqlite3.Connection:
    """Open an empty database in a file of `folder` (default: the system's for temporary files), which lasts until it is closed.

    The file has no name, so that even a process that is killed leaves nothing behind. Its rows survive no crash: they need no journal.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix=".scratch-")
    os.close(handle)
    try:
        database = sqlite3.connect(name)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", f"cache_size = -{CACHE_KIB}"):
            database.execute(f"PRAGMA {setting}")
    finally:
        os.unlink(name)
    return database


class ScratchMap(MutableMapping[str, Any]):
    """Dictionary of what JSON can hold, in a database of its own instead of in memory; values come in the order of their keys' arrival."""

    def __init__(self, folder: Path | None = None) -> None:
        self.database = open_scratch(folder)
        self.database.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, key TEXT UNIQUE, value TEXT)")

    def __setitem__(self, key: str, value: Any) -> None:
        put = "INSERT INTO entries (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        self.database.execute(put, (key, json.dumps(value)))

    def __getitem__(self, key: str) -> Any:
        row = self.database.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return json.loads(row[0])

    def __delitem__(self, key: str) -> None:
        if not self.database.execute("DELETE FROM entries WHERE key = ?", (key,)).rowcount:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self.database.execute("SELECT key FROM entries ORDER BY number"))

    def __len__(self) -> int:
        [count] = self.database.execute("SELECT count(*) FROM entries").fetchone()
        return int(count)
