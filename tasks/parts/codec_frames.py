"""Clips as a codec takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cf_model.codec.interface import latent_frames, video_frames
from cf_model.data.video import read_pieces
from tasks.params.schema import Video

PIECE = 64  # frames that are in memory at once: at 832 x 480 they take 77 MB


def read_frames(path: Path, size: Video) -> Iterator[Tensor]:
    """A clip of 1 + 4k frames, [1, V, Y, X, 3] at a time. What is left over of it, less than a latent, is dropped."""
    pieces = read_pieces(path, height=size.height, width=size.width, fps=size.fps, size=PIECE, cut=lambda n: video_frames(latent_frames(n)))
    return (torch.from_numpy(piece)[None] for piece in pieces)
