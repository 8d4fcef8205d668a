"""Reading of clips in the pieces that a codec takes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cf_model.codec.interface import TIME
from cf_model.data.subprocess_reader import StreamingReader
from cf_model.data.video_reader import read_pieces
from tasks.files.json_lines import Row
from tasks.params.schema import Video

PIECE = 64  # frames that are in memory at once: at 832 x 480 they take 77 MB
TIMEOUT = 300.0  # seconds in which a clip that the filter has read to its end must give its next piece


class ClipReader:
    """Reader of the manifest's clips, in a child process, because a clip may be anyone's file. Use as a context manager."""

    def __init__(self, folder: Path, size: Video) -> None:
        self.folder, self.size = folder, size
        self.reader = StreamingReader(read_pieces, timeout=TIMEOUT)

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.end()

    def read(self, row: Row) -> Iterator[Tensor]:
        """Yield a clip's frames in pieces [1, V, Y, X, 3], 1 + TIME * k frames in all; a rest of less than a latent is dropped."""
        window = {"start": row.get("start") or 0, "frames": row.get("length")}
        waiting, first = torch.empty(0), 1  # 1 + TIME * k frames in the first piece, TIME * k in all others
        for piece in self.reader.stream(self.folder / row["file"], **self.size.model_dump(), size=PIECE, **window):
            waiting = torch.cat([waiting, torch.from_numpy(piece)]) if len(waiting) else torch.from_numpy(piece)
            length = (len(waiting) - first) // TIME * TIME + first
            if length > 0:
                yield waiting[None, :length]
                waiting, first = waiting[length:], 0
