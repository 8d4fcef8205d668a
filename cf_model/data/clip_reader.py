"""Reading of clips in the pieces that a codec takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cf_model.codec.interface import TIME

from .decord_reader import DecordFile
from .subprocess_reader import StreamingReader
from .video_reader import read_pieces

PIECE = 64  # frames that are in memory at once: at 832 x 480 they take 77 MB
Decoder = Literal["pyav", "decord"]  # of params.encode
TIMEOUT = 300.0  # seconds in which a clip that the filter has read to its end must give its next piece


class ClipReader:
    """Reader of the manifest's clips, in a child process, because a clip may be anyone's file. Use as a context manager.

    `size`: height and width in pixels, and fps, of the frames that it gives. `decoder`: decord is tried first, and PyAV gives the frames
    that decord does not; `delivered` says which of them gave the last clip's first frame.
    """

    def __init__(self, folder: Path, size: Mapping[str, Any], decoder: Decoder = "pyav") -> None:
        self.folder, self.size, self.delivered = folder, size, decoder
        self.reader = StreamingReader(read_pieces, timeout=TIMEOUT)
        self.first = StreamingReader(partial(read_pieces, opener=DecordFile), timeout=TIMEOUT) if decoder == "decord" else None

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.end()
        if self.first:
            self.first.end()

    def read(self, row: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield a clip's frames in pieces [1, V, Y, X, 3], 1 + TIME * k frames in all; a rest of less than a latent is dropped."""
        waiting, first = torch.empty(0), 1  # 1 + TIME * k frames in the first piece, TIME * k in all others
        for piece in self._stream_pieces(self.folder / row["file"], row.get("start") or 0, row.get("length")):
            waiting = torch.cat([waiting, torch.from_numpy(piece)]) if len(waiting) else torch.from_numpy(piece)
            length = (len(waiting) - first) // TIME * TIME + first
            if length > 0:
                yield waiting[None, :length]
                waiting, first = waiting[length:], 0

    def _stream_pieces(self, path: Path, start: int, frames: int | None) -> Iterator[np.ndarray]:
        """Yield a file's frames; where decord fails, crashes or hangs, PyAV goes on with the frame after the last one that came."""
        given, self.delivered = 0, "pyav"
        if self.first:
            try:
                for piece in self.first.stream(path, **self.size, size=PIECE, start=start, frames=frames):
                    self.delivered = "decord"
                    given += len(piece)
                    yield piece
                return
            except ValueError:
                pass
        rest = None if frames is None else frames - given
        if rest != 0:
            yield from self.reader.stream(path, **self.size, size=PIECE, start=start + given, frames=rest)
