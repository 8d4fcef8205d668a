"""What was found out about single clips before, by content: after a night with one new clip, one is measured and encoded.

It lies beside the outs and is no part of them: with it or without it a stage writes the same bytes (tests/test_kept.py).
DVC's own cache can't do this, because to DVC a folder with one new file is another folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WORK = Path("work")
UNUSED_DAYS = 30  # what no run has asked for in that time goes: clips that were taken out, codecs that were fitted anew
SIZE = 32  # bytes of the checksum in front


class ClipCache:
    """Bytes by file and by all else that they depend on: `on` (values), our code and the libraries that made them.

    CF_KEPT names the folder, and several checkouts may share one; `off` keeps nothing. Default: work/kept.
    Choice: a damaged entry counts as absent, and what one can't read is made again.
    """

    def __init__(self, name: str, on: Mapping[str, Any], *, modules: Sequence[str], libraries: Sequence[str]) -> None:
        folder = os.environ.get("CF_KEPT") or str(WORK / "kept")
        self.folder = None if folder == "off" else Path(folder) / name
        code = {module: digest(Path(str(sys.modules[module].__file__))) for module in modules}
        versions = {library: importlib.metadata.version(library) for library in libraries}
        self.basis = json.dumps([code, versions, on], sort_keys=True, default=str)
        self.made = 0  # entries that were not there yet

    def place(self, content: str) -> Path | None:
        name = hashlib.sha256(f"{self.basis} {content}".encode()).hexdigest()
        return self.folder and self.folder / name[:2] / name

    def get(self, content: str) -> bytes | None:
        place = self.place(content)
        try:
            whole = place.read_bytes() if place else b""
        except OSError:
            return None
        if len(whole) < SIZE or hashlib.sha256(whole[SIZE:]).digest() != whole[:SIZE]:
            return None
        if place:
            os.utime(place)
        return whole[SIZE:]

    def put(self, content: str, payload: bytes) -> None:
        self.made += 1
        if place := self.place(content):
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(f"{place.name}.{os.getpid()}.partial")
            part.write_bytes(hashlib.sha256(payload).digest() + payload)
            part.replace(place)

    def sweep(self) -> None:
        """To be called by a run that succeeded: removes what is long unused."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for file in self.folder.glob("??/*") if self.folder else ():
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Of a file's bytes, or of all below a folder."""
    return hashlib.sha256("".join(_digests(path)).encode()).hexdigest()


def _digests(path: Path) -> Iterator[str]:
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            yield f"{file.relative_to(path).as_posix()} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n"
