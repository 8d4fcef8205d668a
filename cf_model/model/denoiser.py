"""A diffusers Wan transformer that can look at a memory. Student, teacher and critic are all this class.

Two seams of diffusers are enough, so its model file is used as it is: the attention processor, and the `rope`
submodule, whose output every block hands to its self-attention untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .flow import to_x0
from .memory import ContextMemory, Frame, MemorySpec

Rotation = tuple[Tensor, Tensor]


@dataclass(eq=False)
class View:
    """What the self-attentions of one pass see, instead of a table of rotations."""

    past: tuple[Frame, ...]
    query: Rotation
    keys: Rotation
    taken: list[tuple[Tensor, Tensor]]  # keys and values of this pass, one pair a layer


class ViewRope(nn.Module):
    """Stands in for diffusers' rope: it knows which frames a pass looks at, and where time places them."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: ContextMemory | None = None
        self.taken: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Float[Tensor, "B C F H W"]) -> View:
        frames = x.shape[2]
        past = self.memory.frames if self.memory else ()
        remembered = self.memory.key_positions(frames) if self.memory else []
        current = self.memory.query_positions(frames) if self.memory else list(range(frames))
        query = self.rotations(current, x)
        return View(past, query, self.rotations(remembered + current, x) if past else query, self.taken)

    def rotations(self, positions: Sequence[int], x: Tensor) -> Rotation:
        """cos and sin for whole frames at the given temporal positions, each [1, len(positions) * S, 1, D]."""
        t = self.table
        h, w = x.shape[3] // t.patch_size[1], x.shape[4] // t.patch_size[2]
        if max(positions) >= len(t.freqs_cos):
            raise ValueError(f"frame {max(positions)} lies beyond the RoPE table of {len(t.freqs_cos)} positions; use bounded positions")
        at = torch.tensor(positions, device=x.device)
        cos, sin = (self._grid(freqs, at, h, w) for freqs in (t.freqs_cos, t.freqs_sin))
        return cos, sin

    def _grid(self, freqs: Tensor, at: Tensor, h: int, w: int) -> Tensor:
        t = self.table
        time, row, column = freqs.split([t.t_dim, t.h_dim, t.w_dim], dim=1)
        parts = time[at].view(-1, 1, 1, t.t_dim), row[:h].view(1, h, 1, t.h_dim), column[:w].view(1, 1, w, t.w_dim)
        return torch.cat([p.expand(len(at), h, w, -1) for p in parts], dim=-1).reshape(1, -1, 1, t.attention_head_dim)


class MemoryAttention:
    """Attention processor: bidirectional inside the pass, and over everything remembered."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: View | None = None):  # type: ignore[no-untyped-def]
        from diffusers.models.attention_dispatch import dispatch_attention_fn  # here, so that reading params needs no diffusers

        assert rotary_emb is not None
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        rotary_emb.taken.append((k, v))
        if rotary_emb.past:
            k = torch.cat([*(frame.keys[self.layer] for frame in rotary_emb.past), k], dim=1)
            v = torch.cat([*(frame.values[self.layer] for frame in rotary_emb.past), v], dim=1)
        out = dispatch_attention_fn(rotate(q, rotary_emb.query), rotate(k, rotary_emb.keys), v)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def rotate(x: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """RoPE on interleaved pairs, as Wan stores them."""
    cos, sin = rotation[0][..., 0::2], rotation[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the transformer. Wan2.1-T2V-1.3B: 30 layers, 12 heads of 128, ffn 8960, freq 256, 1024 positions."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    freq: int
    positions: int  # rows of the RoPE table


class Denoiser(nn.Module):
    """x_0 from x_σ, the prompt and the remembered frames; state_dict keys stay those of diffusers under `transformer.`"""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        transformer.rope = ViewRope(transformer.rope)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer))
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel, which this file doesn't import

    def forward(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"],
        text: Float[Tensor, "B T E"],
        memory: ContextMemory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        return to_x0(x_t, self.velocity(x_t, sigma, text, memory), sigma)

    def velocity(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"],
        text: Float[Tensor, "B T E"],
        memory: ContextMemory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """ε - x_0. `sigma` is one level for the whole pass, or one a frame; `memory` None is plain Wan."""
        return self._pass(x_t, sigma, text, memory)[0]

    def remember(
        self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"], memory: ContextMemory, *, grad: bool = False
    ) -> ContextMemory:
        """One pass over a clean chunk, at σ = 0, for its keys and values only."""
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            _, taken = self._pass(x_0, x_0.new_zeros(len(x_0)), text, memory)
        frames = x_0.shape[1]
        layers = [(k.chunk(frames, dim=1), v.chunk(frames, dim=1)) for k, v in taken]
        return memory.remember(
            tuple(Frame(memory.seen + f, tuple(k[f] for k, _ in layers), tuple(v[f] for _, v in layers)) for f in range(frames))
        )

    def watch(self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"], spec: MemorySpec, *, chunk: int) -> ContextMemory:
        """What is remembered after a whole clip, chunk by chunk."""
        memory = ContextMemory(spec)
        for part in x_0.split(chunk, dim=1):
            memory = self.remember(part, text, memory)
        return memory

    def _pass(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: ContextMemory | None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        rope = self.transformer.rope
        rope.memory, rope.taken = memory, []
        timestep = 1000 * sigma
        if timestep.ndim == 2:  # diffusers takes one timestep a token
            timestep = timestep.repeat_interleave(self._tokens(x_t), dim=1)
        velocity = self.transformer(x_t.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)
        taken, rope.memory, rope.taken = rope.taken, None, []
        return velocity, taken

    def _tokens(self, x: Tensor) -> int:
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)
