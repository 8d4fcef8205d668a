"""Rotary positions (RoPE): what turns queries and keys to the place of their token in time, row and column."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .positions import Positions

VECTOR = 32  # float32 numbers that torch multiplies at once, as 16 complex ones; it rounds what is left over in another way
Rotation = Tensor  # complex, [1 or B, L, 1, D / 2]: cos + i sin of the angles of a token, one for each pair of channels


def apply_rope(x: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """Rotate queries or keys: channels 2i and 2i + 1 are a pair, as Wan stores them."""
    pairs = x.unflatten(-1, (-1, 2))
    # One complex product is one operation for eight. On a CPU it takes a twelfth of the time, and is the same to the bit where rows fill
    # its vectors. With a gradient bfloat16 keeps to real products, because of what they store.
    is_exact = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not torch.is_grad_enabled())
    if is_exact and x.shape[-1] % VECTOR == 0 and not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs.float()) * rotation).flatten(-2).type_as(x)
    # a compiler is given cos and sin as real numbers, [1 or B, L, 1, D / 2, 2]
    cos, sin = (torch.view_as_real(rotation) if rotation.is_complex() else rotation).unbind(-1)
    if torch.compiler.is_compiling():
        # The other channel of a pair is read where it lies, so that all is one kernel; halves that are joined would be written first.
        sign = 2 * torch.arange(2, device=x.device) - 1  # even channels: x cos - partner sin; odd ones: x cos + partner sin
        return (pairs * cos[..., None] + pairs.flip(-1) * (sign * sin[..., None])).flatten(-2).type_as(x)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def turn_keys(k: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """Rotate keys as `apply_rope` does, for a store, which rounds them to its own type as it copies them: one copy less in bfloat16."""
    if k.dtype != torch.bfloat16 or k.shape[-1] % VECTOR or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return apply_rope(k, rotation)
    return torch.view_as_real(torch.view_as_complex(k.float().unflatten(-1, (-1, 2))) * rotation).flatten(-2)


def read_rotations(table: Any, positions: Positions | range, x: Float[Tensor, "B C F H W"]) -> Rotation:
    """Return the rotations of frames at these temporal positions, [1 or B, K * S, 1, D / 2] for K positions and latents like `x`.

    `table` is diffusers' WanRotaryPosEmbed. Raises ValueError for positions that it does not have.
    """
    # S = h * w tokens of one latent frame
    h, w = x.shape[3] // table.patch_size[1], x.shape[4] // table.patch_size[2]
    if not isinstance(positions, Tensor):
        if min(positions, default=0) < 0:
            raise ValueError(f"frame {min(positions)} would lie before the video; memory.fast must hold at least the frames of a chunk")
        if max(positions, default=0) >= len(table.freqs_cos):
            last, rows = max(positions), len(table.freqs_cos)
            raise ValueError(f"frame {last} lies beyond the RoPE table of {rows} positions; use bounded positions")
        positions = torch.tensor([list(positions)], dtype=torch.long, device=x.device)
    # diffusers' table holds each angle twice, so every second entry is enough
    cos, sin = (_select_rows(table, freqs[:, half::2], positions, h, w) for half, freqs in enumerate((table.freqs_cos, table.freqs_sin)))
    return torch.complex(cos, sin)


def _select_rows(table: Any, freqs: Tensor, at: Tensor, h: int, w: int) -> Tensor:
    """Return the table's rows for frames at the times `at` [B, K] and an h x w grid of tokens: [B, K * h * w, 1, D / 2]."""
    batch, frames = at.shape
    # D is split into channels for time, row and column, as Wan splits it (128 = 44 + 42 + 42)
    # [positions, D / 2] to a part for each axis; each part is spread over the two other axes
    t_pairs, h_pairs, w_pairs = table.t_dim // 2, table.h_dim // 2, table.w_dim // 2
    time, row, column = freqs.split([t_pairs, h_pairs, w_pairs], dim=1)
    parts = time[at].view(batch, frames, 1, 1, t_pairs), row[:h].view(1, 1, h, 1, h_pairs), column[:w].view(1, 1, 1, w, w_pairs)
    grid = torch.cat([p.expand(batch, frames, h, w, -1) for p in parts], dim=-1)
    return grid.reshape(batch, -1, 1, t_pairs + h_pairs + w_pairs)
