"""Reading of clips in the pieces that a codec takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cf_model.codec.interface import TIME

from .subprocess_reader import StreamingReader
from .video_reader import read_pieces

PIECE = 64  # frames that are in memory at once: at 832 x 480 they take 77 MB
TIMEOUT = 300.0  # seconds in which a clip that the filter has read to its end must give its next piece


class ClipReader:
    """Reader of the manifest's clips, in a child process, because a clip may be anyone's file. Use as a context manager.

    `size`: height and width in pixels, and fps, of the frames that it gives.
    """

    def __init__(self, folder: Path, size: Mapping[str, Any]) -> None:
        self.folder, self.size = folder, size
        self.reader = StreamingReader(read_pieces, timeout=TIMEOUT)

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.end()

    def read(self, row: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield a clip's frames in pieces [1, V, Y, X, 3], 1 + TIME * k frames in all; a rest of less than a latent is dropped."""
        window = {"start": row.get("start") or 0, "frames": row.get("length")}
        waiting, first = torch.empty(0), 1  # 1 + TIME * k frames in the first piece, TIME * k in all others
        for piece in self.reader.stream(self.folder / row["file"], **self.size, size=PIECE, **window):
            waiting = torch.cat([waiting, torch.from_numpy(piece)]) if len(waiting) else torch.from_numpy(piece)
            length = (len(waiting) - first) // TIME * TIME + first
            if length > 0:
                yield waiting[None, :length]
                waiting, first = waiting[length:], 0
