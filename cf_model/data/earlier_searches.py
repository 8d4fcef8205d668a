"""Searches for copies that the run before made, so that a new clip costs its own comparisons and not those of all clips.

A search for a clip gives the accepted clips before it that share most words with it, `full` of them at most. The next run need not
search again among clips that were accepted before the same clip in both runs ("common" clips), if

- both runs judge the common clips in the same order, because order decides between equals and who was there before;
- no clip has left a full list, because the list does not say who would take its place;
- the same words of the clip were too crowded to be looked up.

Then the list without the clips that are gone, together with what is found among the other clips of this run, is what a full search finds
(tests/data/test_duplicates.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

CACHE_KIB = 512  # of the file of earlier searches that SQLite holds in memory
# Clips that were found: number, how many pictures later they begin, words shared, and the place of the first of these words among the
# words looked up; distance and seconds of the comparison (0 seconds: not compared yet; NaN: too little in common).
FOUND = np.dtype([("clip", "<i8"), ("shift", "<i8"), ("shared", "<i8"), ("slot", "<i8"), ("distance", "<f8"), ("seconds", "<f8")])
COLUMNS = "(number INTEGER PRIMARY KEY, key BLOB UNIQUE, accepted INTEGER, crowded BLOB, upright BLOB, mirrored BLOB)"

Found = np.ndarray  # of FOUND


class EarlierSearches:
    """The searches of this run, in its database, and of the run before, in the file `kept`; memory does not grow with them.

    Clips have their numbers by the order in which a run searches for them.
    """

    def __init__(self, database: sqlite3.Connection, kept: Path | None) -> None:
        self.database, self.kept = database, kept
        database.execute(f"CREATE TABLE searches {COLUMNS}")
        database.execute("CREATE TABLE common (earlier INTEGER PRIMARY KEY, number INTEGER)")
        self.file = self._find_file()
        self.earlier = sqlite3.connect(f"{self.file.absolute().as_uri()}?immutable=1", uri=True) if self.file else None
        if self.earlier:
            self.earlier.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.number, self.last = 0, 0  # of the clip that is searched for; the latest number of the run before that this run has met
        self.before: tuple[int, bool] | None = None  # the clip's number in the run before, and whether it was accepted

    def _find_file(self) -> Path | None:
        """Return the file of the run before; a damaged one counts as absent. Its name ends in its SHA-256."""
        for file in sorted(self.kept.parent.glob(f"{self.kept.name}-*")) if self.kept else ():
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() == file.name.rpartition("-")[2]:
                    return file
        return None

    @property
    def any(self) -> bool:
        """Whether there was a run before."""
        return self.earlier is not None

    def recall(self, signature: np.ndarray, crowded: bytes, *, full: int) -> tuple[Found, Found] | None:
        """Begin the search for the next clip; return what the run before found for it among common clips, upright and mirrored.

        None: this is not known. `crowded` says which of its words are too crowded, and `full` how many clips a list has at most.
        """
        key = hashlib.blake2b(b"%d %b" % (len(signature), signature.tobytes()), digest_size=16).digest()
        while self.database.execute("SELECT 1 FROM searches WHERE key = ?", (key,)).fetchone():  # another clip with these pictures
            key = hashlib.blake2b(key, digest_size=16).digest()
        self.number += 1
        self.database.execute("INSERT INTO searches VALUES (?, ?, 0, ?, NULL, NULL)", (self.number, key, crowded))
        row = self.earlier and self.earlier.execute("SELECT * FROM searches WHERE key = ?", (key,)).fetchone()
        self.before = None
        if not row or row[0] <= self.last:  # unknown, or judged in another order
            return None
        self.last, self.before = row[0], (row[0], bool(row[2]))
        lists = [np.frombuffer(blob, FOUND) for blob in row[4:]]
        common = [self._keep_common(one) for one in lists]
        gone = any(len(now) < len(before) == full for now, before in zip(common, lists, strict=True))
        return None if gone or row[3] != crowded else (common[0], common[1])

    def _keep_common(self, found: Found) -> Found:
        """Return the common clips of a list, with their numbers in this run."""
        ask = "SELECT earlier, number FROM common WHERE earlier IN (SELECT value FROM json_each(?))"
        numbers = dict(self.database.execute(ask, (json.dumps(found["clip"].tolist()),))) if len(found) else {}
        common = found[[clip in numbers for clip in found["clip"].tolist()]] if numbers else found[:0].copy()
        common["clip"] = [numbers[clip] for clip in common["clip"].tolist()]
        return common

    def record(self, upright: Found, mirrored: Found) -> None:
        """End the search with what was found."""
        lists = (upright.tobytes(), mirrored.tobytes(), self.number)
        self.database.execute("UPDATE searches SET upright = ?, mirrored = ? WHERE number = ?", lists)

    def accept(self) -> bool:
        """Note that the clip is accepted, and say whether it is common to both runs for the clips after it."""
        self.database.execute("UPDATE searches SET accepted = 1 WHERE number = ?", (self.number,))
        if self.before is None or not self.before[1]:
            return False
        self.database.execute("INSERT INTO common VALUES (?, ?)", (self.before[0], self.number))
        return True

    def save(self) -> None:
        """Write the searches of this run in place of those of the run before."""
        if self.earlier:
            self.earlier.close()
        if not self.kept:
            return
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        partial = self.kept.with_name(f"{self.kept.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(partial, isolation_level=None)) as file:
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
                file.execute(f"PRAGMA {setting}")
            file.execute(f"CREATE TABLE searches {COLUMNS}")
            file.execute("BEGIN")
            file.executemany(
                "INSERT INTO searches VALUES (?, ?, ?, ?, ?, ?)", self.database.execute("SELECT * FROM searches ORDER BY number")
            )
            file.execute("COMMIT")
        with partial.open("rb") as opened:
            name = f"{self.kept.name}-{hashlib.file_digest(opened, 'sha256').hexdigest()}"
        partial.replace(self.kept.with_name(name))
        for old in self.kept.parent.glob(f"{self.kept.name}-*"):
            if old.name != name:
                old.unlink(missing_ok=True)
