"""The key-value cache that most published code has, written plainly for comparison: what `python -m benchmarks chunk` runs beside ours.

The cache is one tensor a layer that every pass writes into. Keys are rotated once, in float64, when they enter; a full cache is shifted
by a clone before a chunk enters; where the chunk goes is read from tensors; the prompt's keys and values are computed once. The blocks
are written as published code writes them, operation by operation, on the weights of a `Denoiser`. tests/test_benchmarks.py shows that
its videos are those of our memory at `positions: absolute`.

In one thing it is leaner than published code: shift, scale and gate are one row a video here. Self-Forcing (wan/modules/causal_model.py)
embeds a level for each latent frame, and spreads rows of each frame over that frame's tokens in every block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cf_model.model.denoiser import Denoiser


class LayerCache:
    """Rotated keys and values of one layer, [B, window * S, N, D], and where the next chunk goes, as tensors."""

    def __init__(self, batch: int, tokens: int, heads: int, channels: int, like: Tensor) -> None:
        self.keys, self.values = (like.new_zeros(batch, tokens, heads, channels) for _ in range(2))
        self.video_end, self.cache_end = (torch.zeros(1, dtype=torch.long, device=like.device) for _ in range(2))

    def write(self, k: Tensor, v: Tensor, start: int, sink: int) -> tuple[Tensor, Tensor]:
        """Write a chunk that begins at token `start` of the video; return the keys and values that it attends to."""
        new, size = k.shape[1], self.keys.shape[1]
        end = start + new
        if end > self.video_end.item() and new + self.cache_end.item() > size:
            # the oldest tokens behind the sink make room
            evicted = new + self.cache_end.item() - size
            moved = self.cache_end.item() - evicted - sink
            for cache in (self.keys, self.values):
                cache[:, sink : sink + moved] = cache[:, sink + evicted : sink + evicted + moved].clone()
            cache_end = self.cache_end.item() + end - self.video_end.item() - evicted
        else:
            cache_end = self.cache_end.item() + end - self.video_end.item()
        self.keys[:, cache_end - new : cache_end] = k
        self.values[:, cache_end - new : cache_end] = v
        self.video_end.fill_(end)
        self.cache_end.fill_(cache_end)
        return self.keys[:, :cache_end], self.values[:, :cache_end]


class UsualStudent:
    """The causal student with that cache: a sink, a window of the newest frames, absolute positions."""

    def __init__(self, denoiser: Denoiser, *, sink: int, window: int) -> None:
        self.transformer, self.sink, self.window = denoiser.transformer, sink, window
        config = self.transformer.config
        self.channels = config.attention_head_dim
        side = 2 * (self.channels // 6)  # channels of rows and of columns; time has the rest
        self.angles = [make_angles(config.rope_max_seq_len, size) for size in (self.channels - 2 * side, side, side)]
        self.caches: list[LayerCache] = []
        self.prompt: list[tuple[Tensor, Tensor] | None] = []

    def make_chunk(self, noise: list[Tensor], sigmas: list[float], text: Tensor, first: int) -> Tensor:
        """Denoise the chunk that begins at latent frame `first` by all levels, then pass it clean. Returns x_0 [B, F, C, H, W]."""
        x_t = x_0 = noise[0]
        for step, sigma in enumerate(sigmas):
            if step:
                x_t = (1 - sigma) * x_0 + sigma * noise[step]
            x_0 = x_t - sigma * self.run_pass(x_t, sigma, text, first)
        self.run_pass(x_0, 0.0, text, first)
        return x_0

    def run_pass(self, x: Tensor, sigma: float, text: Tensor, first: int) -> Tensor:
        """Return the velocity of a chunk [B, F, C, H, W] whose first frame is `first`, and leave its keys and values in the cache."""
        t, embedder = self.transformer, self.transformer.condition_embedder
        grid = x.shape[1], x.shape[3] // 2, x.shape[4] // 2
        hidden = t.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2).contiguous()
        level = embedder.time_embedder(embed_level(1000 * sigma, t.config.freq_dim, x).type_as(hidden))
        rows = embedder.time_proj(F.silu(level)).unflatten(1, (6, -1))
        words = embedder.text_embedder  # whose own forward would remember the prompt
        context = words.linear_2(words.act_1(words.linear_1(text)))
        if not self.caches:
            sizes = len(x), self.window * grid[1] * grid[2], t.config.num_attention_heads, self.channels
            self.caches = [LayerCache(*sizes, like=hidden) for _ in t.blocks]
            self.prompt = [None for _ in t.blocks]
        for layer, block in enumerate(t.blocks):
            hidden = self.run_block(block, layer, hidden, context, rows, grid, first)
        shift, scale = (t.scale_shift_table + level.unsqueeze(1)).chunk(2, dim=1)
        hidden = (t.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        patches = t.proj_out(hidden).unflatten(2, (2, 2, -1)).unflatten(1, grid)
        # [B, f, h, w, 2, 2, C] to [B, f, C, 2 h, 2 w]
        return torch.einsum("bfhwqrc->bfchqwr", patches).reshape(x.shape)

    def run_block(self, block: Any, layer: int, x: Tensor, context: Tensor, rows: Tensor, grid: tuple[int, int, int], first: int) -> Tensor:
        """Run one block over a chunk: self-attention to the cache, attention to the prompt, feed-forward."""
        e = (block.scale_shift_table + rows).chunk(6, dim=1)
        x = x + self.attend_cache(block.attn1, layer, block.norm1(x.float()).type_as(x) * (1 + e[1]) + e[0], grid, first) * e[2]
        x = x + self.attend_prompt(block.attn2, layer, block.norm2(x.float()).type_as(x), context)
        up, down = block.ffn.net[0].proj, block.ffn.net[2]  # whose own forward would compute product and activation in one
        normed = block.norm3(x.float()).type_as(x) * (1 + e[4]) + e[3]
        return x + down(F.gelu(up(normed), approximate="tanh")) * e[5]

    def attend_cache(self, attention: Any, layer: int, x: Tensor, grid: tuple[int, int, int], first: int) -> Tensor:
        """Rotate queries and keys, write keys and values into the layer's cache, and attend to all of it."""
        heads = (attention.heads, -1)
        q = normalise(attention.to_q(x), attention.norm_q).unflatten(2, heads)
        k = normalise(attention.to_k(x), attention.norm_k).unflatten(2, heads)
        v = attention.to_v(x).unflatten(2, heads)
        q, k = rotate(q, grid, self.angles, first).type_as(v), rotate(k, grid, self.angles, first).type_as(v)
        tokens = grid[1] * grid[2]
        keys, values = self.caches[layer].write(k, v, first * tokens, self.sink * tokens)
        return attention.to_out[0](attend(q, keys, values))

    def attend_prompt(self, attention: Any, layer: int, x: Tensor, context: Tensor) -> Tensor:
        """Attend to the prompt, whose keys and values are computed by the video's first pass."""
        heads = (attention.heads, -1)
        q = normalise(attention.to_q(x), attention.norm_q).unflatten(2, heads)
        if self.prompt[layer] is None:
            k = normalise(attention.to_k(context), attention.norm_k).unflatten(2, heads)
            self.prompt[layer] = k, attention.to_v(context).unflatten(2, heads)
        return attention.to_out[0](attend(q, *self.prompt[layer]))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with torch's own kernel: [B, L, N, D] to [B, L, N * D]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)


def normalise(x: Tensor, norm: Any) -> Tensor:
    """Normalise by the root mean square, in float32, in separate operations."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def make_angles(positions: int, channels: int) -> Tensor:
    """Make the table of rotations in float64, as complex numbers: [positions, channels / 2]."""
    rates = 1.0 / torch.pow(10000.0, torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), rates)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, grid: tuple[int, int, int], angles: list[Tensor], first: int) -> Tensor:
    """Rotate [B, L, N, D] video by video, in float64; the table of the grid is put together anew in every call."""
    f, h, w = grid
    time, row, column = angles
    rotated = []
    for video in x:
        pairs = torch.view_as_complex(video[: f * h * w].to(torch.float64).unflatten(-1, (-1, 2)))
        parts = [time[first : first + f].view(f, 1, 1, -1), row[:h].view(1, h, 1, -1), column[:w].view(1, 1, w, -1)]
        table = torch.cat([part.expand(f, h, w, -1) for part in parts], dim=-1).reshape(f * h * w, 1, -1)
        rotated.append(torch.cat([torch.view_as_real(pairs * table).flatten(2), video[f * h * w :]]))
    return torch.stack(rotated).float()


def embed_level(level: float, channels: int, like: Tensor) -> Tensor:
    """Embed a noise level in float64: [B, channels], cosines first."""
    half = channels // 2
    rates = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=like.device) / half)
    angles = torch.outer(torch.full((len(like),), level, dtype=torch.float64, device=like.device), rates)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
