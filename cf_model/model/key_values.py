"""Keys and values of latent frames, which the memories hold, and the mean key by which eq. 7 compares chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys (before rotation) and values of one latent frame: one [B, S, N, D] tensor a layer; detached but in causal_init.

    Keys are held without RoPE, because bounded positions (eq. 8) give a frame a new place with every chunk.
    """

    index: int  # number of the latent frame, counted from the video's first
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Frames = tuple[KeyValues, ...]  # in the order of time


def split_newest(frames: Frames, keep: int) -> tuple[Frames, Frames]:
    """Return all but the last `keep` frames, and those."""
    at = max(len(frames) - keep, 0)
    return frames[:at], frames[at:]


def mean_key(chunk: Frames) -> Tensor:
    """Average the keys of the batch's first video over the chunk's tokens, in each layer: [layers, N * D].

    Choice: one decision for the whole batch (its first video's) and, with scope global, for all layers (the mean of their
    cosines). Layers that decide on their own remember different frames, and the teacher can't be shown the same ones. An
    average over videos would be smoother than any one of them, and training would promote what inference does not.
    """
    layers = range(len(chunk[0].keys))
    # keys[layer][0] is [S, N, D]; stacked over the chunk [F, S, N, D], averaged [N, D], flattened [N * D]
    return torch.stack([torch.stack([f.keys[layer][0] for f in chunk]).float().mean(dim=(0, 1)).flatten() for layer in layers]).detach()
