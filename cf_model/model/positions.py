"""Temporal RoPE indices of frames, as a memory gives them (eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

# the same for all videos, or [B, K] where they depend on what a video has promoted
Positions = list[int] | Tensor


def join_positions(*parts: Positions) -> Positions:
    """Join positions, as a list where all are lists, else [B, K]."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return [position for part in parts for position in part]
    like = tensors[0]
    rows = [torch.as_tensor(part, dtype=like.dtype, device=like.device).expand(len(like), -1) for part in parts if len(part)]
    return torch.cat(rows, dim=1)
