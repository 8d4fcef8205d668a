"""What a stage must look up later and must not hold in memory: an SQLite database in a temporary file."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path

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
