"""Reading of clips in the pieces that a codec takes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cf_model.codec.interface import latent_frames, video_frames
from cf_model.data.video import read_pieces
from tasks.params.schema import Video

PIECE = 64  # frames that are in memory at once: at 832 x 480 they take 77 MB


def read_frames(path: Path, size: Video) -> Iterator[Tensor]:
    """Yield a clip's frames in pieces [1, V, Y, X, 3], 1 + 4k frames in all; what is left over, less than a latent, is dropped."""
    pieces = read_pieces(path, **size.model_dump(), size=PIECE, cut=lambda frames: video_frames(latent_frames(frames)))
    return (torch.from_numpy(piece)[None] for piece in pieces)
