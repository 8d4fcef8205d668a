"""The videos anywhere below a folder, which the owner may have filled with anything."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path

CACHE_KIB = 512  # of the list of files that is in memory, however many there are


class VideoFolder:
    """The videos anywhere below a folder, through linked folders too, and what looks like one and is none.

    Hidden files are no videos; a file with several names counts once. The list is in a temporary file, because memory must not grow with
    the number of files. `suffixes`: endings of videos, in lower case; the case of a file's own does not matter.
    """

    def __init__(self, folder: Path, suffixes: Collection[str]) -> None:
        self.folder, self.suffixes = folder, suffixes
        self.database = sqlite3.connect("")  # a temporary file of SQLite's own
        self.database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        # path: its parts between zero bytes, in whose order paths are sorted; inode: null for what is no file
        self.database.execute("CREATE TABLE files (path BLOB PRIMARY KEY, inode TEXT, video INTEGER, why TEXT) WITHOUT ROWID")
        self._walk(folder, (folder.resolve(),))
        self.database.execute("CREATE INDEX names ON files (inode, path)")

    @property
    def videos(self) -> Iterator[Path]:
        """The videos, sorted by path."""
        return (path for path, why in self._list_files() if why is None)

    @property
    def left_out(self) -> Iterator[tuple[Path, str]]:
        """Files and folders that are left out, and why: first the folders, each sorted by path."""
        folders = self.database.execute("SELECT path, why FROM files WHERE video IS NULL ORDER BY path")
        yield from ((self._decode(path), why) for path, why in folders)
        yield from ((path, why) for path, why in self._list_files() if why is not None)

    def _list_files(self) -> Iterator[tuple[Path, str | None]]:
        """Yield each file and why it is left out, or None."""
        first = "(SELECT min(path) FROM files AS other WHERE other.inode = files.inode)"
        ask = f"SELECT path, why, iif(inode IS NULL, path, {first}) FROM files WHERE video ORDER BY path"
        for path, why, known in self.database.execute(ask):
            again = known != path and f"is {self._decode(known).relative_to(self.folder).as_posix()} under another name"
            yield self._decode(path), why or again or None

    def _walk(self, folder: Path, above: tuple[Path, ...]) -> None:
        """List all below a folder; a link to a folder above it is left out, because it has no end."""
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = folder / entry.name
                    if not entry.is_dir():
                        if path.suffix.lower() in self.suffixes:
                            self._add_file(path)
                    elif entry.name.startswith("."):
                        continue
                    elif (real := path.resolve()) in above:
                        self._add(path, None, None, "is a link to a folder that it is in")
                    else:
                        self._walk(path, (*above, real))
        except OSError as error:
            self._add(folder, None, None, f"can't be read ({error.strerror})")

    def _add_file(self, path: Path) -> None:
        """List a file by its name, and its inode, which tells its other names."""
        try:
            stat = path.stat()
        except OSError as error:
            self._add(path, None, True, "is a link to nothing" if path.is_symlink() else f"can't be read ({error.strerror})")
            return
        self._add(path, f"{stat.st_dev} {stat.st_ino}", path.is_file(), "is hidden" if path.name.startswith(".") else None)

    def _add(self, path: Path, inode: str | None, video: bool | None, why: str | None) -> None:
        parts = "\0".join(path.relative_to(self.folder).parts).encode(errors="surrogatepass")
        self.database.execute("INSERT INTO files VALUES (?, ?, ?, ?)", (parts, inode, video, why))

    def _decode(self, path: bytes) -> Path:
        return self.folder.joinpath(*path.decode(errors="surrogatepass").split("\0"))
