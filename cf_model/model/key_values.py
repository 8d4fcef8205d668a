"""Keys and values of latent frames, which a memory holds, and the mean key by which eq. 7 compares chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys (before rotation) and values of one latent frame: one [B, S, N, D] tensor a layer; detached but in causal_init.

    Keys are held without RoPE, because bounded positions (eq. 8) give a frame a new place with every chunk.
    """

    index: int  # number of the latent frame, counted from the video's first
    keys: Sequence[Tensor]  # lists while a pass makes them
    values: Sequence[Tensor]

    def copy(self) -> KeyValues:
        """Return a copy, because a frame's tensors are slices of its chunk's, which would stay in memory with all their frames."""
        return KeyValues(self.index, tuple(k.clone() for k in self.keys), tuple(v.clone() for v in self.values))


Frames = tuple[KeyValues, ...]  # in the order of time
LayerKeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values of one pass, each [B, L, N, D]


def split_newest(frames: Frames, keep: int) -> tuple[Frames, Frames]:
    """Return all but the last `keep` frames, and those."""
    at = max(len(frames) - keep, 0)
    return frames[:at], frames[at:]


def mean_key(chunk: Frames) -> Float[Tensor, "B layers ND"]:
    """Average each video's keys over the chunk's tokens, in each layer."""
    layers = range(len(chunk[0].keys))
    # keys[layer] is [B, S, N, D]; over the chunk [F, B, S, N, D], averaged [B, N, D], flattened [B, N * D]
    means = (torch.stack([f.keys[layer] for f in chunk]).mean(dim=(0, 2), dtype=torch.float32).flatten(1) for layer in layers)
    return torch.stack(list(means), dim=1).detach()


def split_frames(captured: LayerKeyValues, first: int, frames: int) -> tuple[KeyValues, ...]:
    """Cut a pass's keys and values into its frames, of which the first has the number `first`: [B, F * S, N, D] to F of [B, S, N, D]."""
    # by layer first, as the pass gives them, then by frame, as a memory holds them
    layers = [(k.chunk(frames, dim=1), v.chunk(frames, dim=1)) for _, (k, v) in sorted(captured.items())]
    return tuple(KeyValues(first + f, tuple(k[f] for k, _ in layers), tuple(v[f] for _, v in layers)) for f in range(frames))
