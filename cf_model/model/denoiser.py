"""A diffusers Wan transformer that can look at a memory. Student, teacher and critic are all this class.

Two seams of diffusers are enough, so its model file is used as it is: the attention processor, and the `rope`
submodule, whose output every block hands to its self-attention untouched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .flow import to_x0
from .key_values import KeyValues
from .memory import LayerMemories, Memory, MemorySpec, ShareKey, empty_memory, fixed_memory

Rotation = tuple[Tensor, Tensor]
LayerKeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values
Attention = Literal["native", "cudnn", "flash2", "flash3"]
Precision = Literal["float32", "bfloat16"]


# our names of diffusers' attention backends, and the package that each needs
BACKENDS = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "flash2": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
}


@dataclass(frozen=True)
class Compute:
    """How a model's arithmetic is done. Only rounding depends on it."""

    attention: Attention  # of the self-attention, by diffusers' dispatcher
    dtype: Precision  # of the products; weights, norms and sums stay in float32
    checkpointing: bool  # activations of a block are computed again in the backward pass instead of being kept

    def __post_init__(self) -> None:
        if self.attention != "native" and self.dtype == "float32":
            stated = f"attention is {self.attention}, which computes in bfloat16, but dtype is {self.dtype}"
            raise ValueError(f"{stated}; use dtype: bfloat16, or attention: native")


EXACT = Compute(attention="native", dtype="float32", checkpointing=False)


@dataclass(eq=False)
class PassView:
    """What the self-attentions of one pass see, instead of a table of rotations."""

    memory: Memory | None
    rotations: list[tuple[Rotation, Rotation]]  # of queries and of keys; one pair a layer, or one for all
    taken: LayerKeyValues | None  # where this pass's keys and values go, if anybody wants them

    def at(self, layer: int) -> tuple[Rotation, Rotation]:
        return self.rotations[layer if len(self.rotations) > 1 else 0]


class MemoryRope(nn.Module):
    """Stands in for diffusers' rope: it knows which frames a pass looks at, and where time places them."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: Memory | None = None
        self.taken: LayerKeyValues | None = None

    def forward(self, x: Float[Tensor, "B C F H W"]) -> PassView:
        frames = x.shape[2]
        if self.memory is None:
            rotation = self.rotations(range(frames), x)
            return PassView(None, [(rotation, rotation)], self.taken)
        layers = len(self.memory.layers) if isinstance(self.memory, LayerMemories) else 1
        made: dict[tuple[int, ...], Rotation] = {}
        pairs = []
        for layer in range(max(layers, 1)):
            current = tuple(self.memory.query_positions(frames, layer))
            seen = (*self.memory.key_positions(frames, layer), *current)
            for positions in (current, seen):
                if positions not in made:
                    made[positions] = self.rotations(positions, x)
            pairs.append((made[current], made[seen]))
        return PassView(self.memory, pairs, self.taken)

    def rotations(self, positions: Sequence[int], x: Tensor) -> Rotation:
        """cos and sin for whole frames at the given temporal positions, each [1, len(positions) * S, 1, D]."""
        t = self.table
        h, w = x.shape[3] // t.patch_size[1], x.shape[4] // t.patch_size[2]
        if min(positions) < 0:
            raise ValueError(f"frame {min(positions)} would lie before the video; memory.fast must hold at least the frames of a chunk")
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

    def __init__(self, layer: int, backend: str) -> None:
        self.layer, self.backend = layer, backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: PassView | None = None):  # type: ignore[no-untyped-def]
        from diffusers.models.attention_dispatch import dispatch_attention_fn  # here, so that reading params needs no diffusers

        assert rotary_emb is not None
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        # in bfloat16 the norm's answer is wider than the values: what is remembered should not be
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        if rotary_emb.taken is not None:
            rotary_emb.taken[self.layer] = (k, v)
        queries, keys = rotary_emb.at(self.layer)
        if rotary_emb.memory is not None:
            past_k, past_v = rotary_emb.memory.past(self.layer)
            k, v = torch.cat([*past_k, k], dim=1), torch.cat([*past_v, v], dim=1)
        out = dispatch_attention_fn(apply_rope(q, queries).to(v.dtype), apply_rope(k, keys), v, backend=self.backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def apply_rope(x: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """RoPE on interleaved pairs, as Wan stores them."""
    cos, sin = rotation[0][..., 0::2], rotation[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def widen_input(norm: nn.RMSNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a norm's input to its weight's type, because torch has a fused kernel only where the two are equal."""
    return tuple(x.to(norm.weight.dtype) for x in inputs)


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

    def __init__(self, transformer: Any, compute: Compute = EXACT) -> None:
        super().__init__()
        backend, package = BACKENDS[compute.attention]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"attention is {compute.attention}, but the package {package} is not installed; install it, or use native")
        if compute.attention != "native" and not torch.cuda.is_available():
            raise ValueError(f"attention is {compute.attention}, which needs a GPU, and there is none; use native")
        transformer.rope = MemoryRope(transformer.rope)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer, backend))
        for norm in (module for module in transformer.modules() if isinstance(module, nn.RMSNorm)):
            norm.register_forward_pre_hook(widen_input)  # under autocast the input is bfloat16 and the weights are float32
        if compute.checkpointing:
            transformer.enable_gradient_checkpointing()
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel, which this file doesn't import
        self.compute = compute

    def forward(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"],
        text: Float[Tensor, "B T E"],
        memory: Memory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        return to_x0(x_t, self.velocity(x_t, sigma, text, memory), sigma)

    def velocity(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"],
        text: Float[Tensor, "B T E"],
        memory: Memory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """ε - x_0. `sigma` is one level for the whole pass, or one a frame; `memory` None is plain Wan."""
        return self._pass(x_t, sigma, text, memory, None)

    def remember(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        memory: Memory,
        *,
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"] | None = None,
        grad: bool = False,
    ) -> Memory:
        """One pass over a chunk for its keys and values only: clean, or at a level `sigma` (Self-Forcing's context noise)."""
        frames, level = x_0.shape[1], x_0.new_zeros(len(x_0)) if sigma is None else sigma
        taken: LayerKeyValues = {}
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            self._pass(x_0, level, text, memory.commit_context(frames), taken)
        return memory.remember(split_frames(taken, memory.frame_count, frames))

    def read_context(self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"]) -> Memory:
        """One clean pass over some frames, which see each other and nothing else: all that is remembered, with its graph."""
        taken: LayerKeyValues = {}
        self._pass(x_0, x_0.new_zeros(len(x_0)), text, None, taken)
        return fixed_memory(split_frames(taken, 0, x_0.shape[1]))

    def offer(
        self, x_t: Float[Tensor, "B F C H W"], sigma: Float[Tensor, " B"], text: Float[Tensor, "B T E"], memory: Memory
    ) -> tuple[Float[Tensor, "B F C H W"], Memory]:
        """`forward`, and the memory after it was offered this pass's keys (timing first_call)."""
        taken: LayerKeyValues = {}
        velocity = self._pass(x_t, sigma, text, memory, taken)
        return to_x0(x_t, velocity, sigma), memory.offer(split_frames(taken, memory.frame_count, x_t.shape[1]))

    def remember_clip(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        spec: MemorySpec,
        *,
        chunk: int,
        share_key: ShareKey | None = None,
    ) -> Memory:
        """What is remembered after a whole clip, chunk by chunk."""
        memory = empty_memory(spec, share_key)
        for part in x_0.split(chunk, dim=1):
            memory = self.remember(part, text, memory)
        return memory

    def _pass(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None, taken: LayerKeyValues | None) -> Tensor:
        """The velocity. Keys and values go to `taken` where they are wanted: a checkpointed pass would keep them all."""
        rope = self.transformer.rope
        rope.memory, rope.taken = memory, taken
        timestep = 1000 * sigma
        if timestep.ndim == 2:  # diffusers takes one timestep a token
            timestep = timestep.repeat_interleave(self._tokens(x_t), dim=1)
        low = self.compute.dtype == "bfloat16"
        try:
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=low):
                velocity = self.transformer(x_t.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)
        finally:
            rope.memory, rope.taken = None, None
        return velocity.to(x_t.dtype)

    def _tokens(self, x: Tensor) -> int:
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)


def split_frames(taken: LayerKeyValues, first: int, frames: int) -> tuple[KeyValues, ...]:
    """A pass's keys and values, one frame after the other, the first of them numbered `first`."""
    layers = [(k.chunk(frames, dim=1), v.chunk(frames, dim=1)) for _, (k, v) in sorted(taken.items())]
    return tuple(KeyValues(first + f, tuple(k[f] for k, _ in layers), tuple(v[f] for _, v in layers)) for f in range(frames))
