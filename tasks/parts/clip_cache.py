"""Cache of results of single clips, keyed by content: after a new clip arrives, only that clip is measured and encoded.

The cache lies beside a stage's outs and changes none of them: with it or without it a stage writes the same bytes
(tests/test_kept.py). DVC's own cache can't do this, because to DVC a folder with a new file is another folder.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.settings import read_settings

WORK = Path("work")
UNUSED_DAYS = 30  # an entry that no run has read for so long is removed: of clips that were taken out, of codecs fitted anew
CHECKSUM_BYTES = 32  # a SHA-256 before each entry's payload


class ClipCache:
    """Entries of bytes, keyed by a clip's content and all else that they depend on: values (`on`), our code and libraries.

    CF_KEPT names the folder, which several checkouts may share; `off` stores nothing. Default: work/kept.
    Choice: a damaged or unreadable entry counts as absent and is computed again.
    """

    def __init__(self, name: str, on: Mapping[str, Any], *, modules: Sequence[str], libraries: Sequence[str]) -> None:
        folder = read_settings().clip_cache or str(WORK / "kept")
        self.folder = None if folder == "off" else Path(folder) / name
        code = {module: compute_dvc_md5(Path(str(sys.modules[module].__file__))) for module in modules}
        versions = {library: importlib.metadata.version(library) for library in libraries}
        self.basis = json.dumps([code, versions, on], sort_keys=True, default=str)
        self.new_entries = 0  # computed by this run

    def entry_path(self, content: str) -> Path | None:
        """Return the file of an entry; None if the cache is off."""
        name = hashlib.sha256(f"{self.basis} {content}".encode()).hexdigest()
        return self.folder and self.folder / name[:2] / name

    def get(self, content: str) -> bytes | None:
        """Return an entry's payload and mark the entry as used; None if it is absent or damaged."""
        path = self.entry_path(content)
        try:
            stored = path.read_bytes() if path else b""
        except OSError:
            return None
        checksum, payload = stored[:CHECKSUM_BYTES], stored[CHECKSUM_BYTES:]
        if hashlib.sha256(payload).digest() != checksum:
            return None
        if path:
            os.utime(path)
        return payload

    def put(self, content: str, payload: bytes) -> None:
        """Store an entry; processes that share the folder may store the same entry at the same time."""
        self.new_entries += 1
        if path := self.entry_path(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, hashlib.sha256(payload).digest() + payload, shared=True)

    def sweep(self) -> None:
        """Remove entries that have long been unused; a stage calls this only when it has succeeded."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for file in self.folder.glob("??/*") if self.folder else ():
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)
