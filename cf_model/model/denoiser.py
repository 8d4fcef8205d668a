"""G_φ, s_real and s_fake of alg. 1: a diffusers Wan transformer that can look at a memory. All three are this class.

diffusers' model file is used as it is, because two of its seams are enough: the attention processor, and the `rope`
submodule, whose output every block hands to its self-attention untouched. So `rope` hands over the memory as well.
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

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [1, L, 1, D]
LayerKeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values of one pass, each [B, L, N, D]
Attention = Literal["native", "cudnn", "flash2", "flash3"]
Precision = Literal["float32", "bfloat16"]


# params.yaml's names of attention kernels: diffusers' names, and the package that each needs
BACKENDS = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "flash2": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
}


@dataclass(frozen=True)
class Compute:
    """How a model computes: kernel, precision, and what is stored for the backward pass. Results differ by rounding alone."""

    attention: Attention  # of the self-attention, by diffusers' dispatcher
    dtype: Precision  # of the products; weights, norms and sums stay in float32
    checkpointing: bool  # compute a block's activations again in the backward pass instead of storing them

    def __post_init__(self) -> None:
        # flash and cuDNN kernels exist for half precision only
        if self.attention != "native" and self.dtype == "float32":
            problem = f"attention is {self.attention}, which computes in bfloat16, but dtype is {self.dtype}"
            raise ValueError(f"{problem}; use dtype: bfloat16, or attention: native")


EXACT = Compute(attention="native", dtype="float32", checkpointing=False)


@dataclass(eq=False)
class PassView:
    """What one pass's self-attentions look at. Travels through diffusers where a table of rotations would."""

    memory: Memory | None
    rotations: list[tuple[Rotation, Rotation]]  # of queries and of keys: a pair for each layer, or a single pair for all
    captured: LayerKeyValues | None  # filled with this pass's keys and values; None: they are not wanted

    def layer_rotations(self, layer: int) -> tuple[Rotation, Rotation]:
        """Return a layer's rotations of queries and of keys."""
        return self.rotations[layer if len(self.rotations) > 1 else 0]


class MemoryRope(nn.Module):
    """Stand-in for diffusers' rope that gives each remembered frame the temporal position of eq. 8."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: Memory | None = None
        self.captured: LayerKeyValues | None = None

    def forward(self, x: Float[Tensor, "B C F H W"]) -> PassView:
        """Return what the self-attentions of the pass over `x` look at, and its rotations."""
        frames = x.shape[2]
        # without a memory: plain Wan, whose frames are at 0, 1, 2, …
        if self.memory is None:
            rotation = self.rotations(range(frames), x)
            return PassView(None, [(rotation, rotation)], self.captured)
        # With scope layer the layers remember different frames, so each has positions of its own; equal positions share a table.
        layers = len(self.memory.layers) if isinstance(self.memory, LayerMemories) else 1
        tables: dict[tuple[int, ...], Rotation] = {}
        pairs = []
        for layer in range(max(layers, 1)):
            current = tuple(self.memory.query_positions(frames, layer))
            keys = (*self.memory.key_positions(frames, layer), *current)
            for positions in (current, keys):
                if positions not in tables:
                    tables[positions] = self.rotations(positions, x)
            pairs.append((tables[current], tables[keys]))
        return PassView(self.memory, pairs, self.captured)

    def rotations(self, positions: Sequence[int], x: Tensor) -> Rotation:
        """Return cos and sin for frames at these temporal positions, each [1, len(positions) * S, 1, D]."""
        t = self.table
        # S = h * w tokens of one latent frame
        h, w = x.shape[3] // t.patch_size[1], x.shape[4] // t.patch_size[2]
        if min(positions) < 0:
            raise ValueError(f"frame {min(positions)} would lie before the video; memory.fast must hold at least the frames of a chunk")
        if max(positions) >= len(t.freqs_cos):
            raise ValueError(f"frame {max(positions)} lies beyond the RoPE table of {len(t.freqs_cos)} positions; use bounded positions")
        at = torch.tensor(positions, device=x.device)
        cos, sin = (self._select_rows(freqs, at, h, w) for freqs in (t.freqs_cos, t.freqs_sin))
        return cos, sin

    def _select_rows(self, freqs: Tensor, at: Tensor, h: int, w: int) -> Tensor:
        """Return the table's rows for frames at the times `at` and an h x w grid of tokens: [1, len(at) * h * w, 1, D]."""
        t = self.table
        # D is split into channels for time, row and column, as Wan splits it (128 = 44 + 42 + 42)
        # [positions, D] to a part for each axis; each part is spread over the two other axes
        time, row, column = freqs.split([t.t_dim, t.h_dim, t.w_dim], dim=1)
        parts = time[at].view(-1, 1, 1, t.t_dim), row[:h].view(1, h, 1, t.h_dim), column[:w].view(1, 1, w, t.w_dim)
        return torch.cat([p.expand(len(at), h, w, -1) for p in parts], dim=-1).reshape(1, -1, 1, t.attention_head_dim)


class MemoryAttention:
    """Attention processor of diffusers: bidirectional over the frames of the pass and over everything remembered."""

    def __init__(self, layer: int, backend: str) -> None:
        self.layer, self.backend = layer, backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: PassView | None = None):  # type: ignore[no-untyped-def]
        from diffusers.models.attention_dispatch import dispatch_attention_fn  # here, so that reading params needs no diffusers

        assert rotary_emb is not None
        # hidden_states [B, L, N * D], L = F * S tokens; q, k, v [B, L, N, D]. The norms are over all N * D channels, as in Wan.
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        # in bfloat16 the norm's answer is float32, which a memory need not hold
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        # before RoPE: positions are given anew whenever the keys are used
        if rotary_emb.captured is not None:
            rotary_emb.captured[self.layer] = (k, v)
        queries, keys = rotary_emb.layer_rotations(self.layer)
        if rotary_emb.memory is not None:
            past_k, past_v = rotary_emb.memory.past(self.layer)
            # the KV cache of alg. 1: [B, (K + F) * S, N, D] for K remembered frames
            k, v = torch.cat([*past_k, k], dim=1), torch.cat([*past_v, v], dim=1)
        # no mask: causality is in what the memory holds, and the frames of a chunk see each other
        out = dispatch_attention_fn(apply_rope(q, queries).to(v.dtype), apply_rope(k, keys), v, backend=self.backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def apply_rope(x: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """Rotate queries or keys (RoPE): channels 2i and 2i + 1 are a pair, as Wan stores them."""
    # diffusers' table holds each angle twice, so every second entry is enough; [B, L, N, D / 2] from here
    cos, sin = rotation[0][..., 0::2], rotation[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def widen_input(norm: nn.RMSNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a norm's input to its weight's type, because torch has a fused kernel only where the two are equal."""
    return tuple(x.to(norm.weight.dtype) for x in inputs)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a transformer. Wan2.1-T2V-1.3B: 30 layers, 12 heads of 128, ffn 8960, freq 256, 1024 positions."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    freq: int
    positions: int  # rows of the RoPE table


class Denoiser(nn.Module):
    """Predictor of x_0 from x_σ, the prompt and the remembered frames.

    Its state_dict has diffusers' keys under `transformer.`, so weights go to and fro unchanged.
    """

    def __init__(self, transformer: Any, compute: Compute = EXACT) -> None:
        super().__init__()
        backend, package = BACKENDS[compute.attention]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"attention is {compute.attention}, but the package {package} is not installed; install it, or use native")
        if compute.attention != "native" and not torch.cuda.is_available():
            raise ValueError(f"attention is {compute.attention}, which needs a GPU, and there is none; use native")
        # the two seams: positions and memory by way of `rope`, attention by its processor
        transformer.rope = MemoryRope(transformer.rope)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer, backend))
        # under autocast a norm's input is bfloat16 and its weights are float32
        for norm in (module for module in transformer.modules() if isinstance(module, nn.RMSNorm)):
            norm.register_forward_pre_hook(widen_input)
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
        """Return x_0 = x_σ - σ v of a chunk or window that sees `memory`."""
        return to_x0(x_t, self.velocity(x_t, sigma, text, memory), sigma)

    def velocity(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"],
        text: Float[Tensor, "B T E"],
        memory: Memory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return v = ε - x_0. `sigma` is a level for each sample or for each frame; without `memory` the pass is plain Wan."""
        return self._run_transformer(x_t, sigma, text, memory, None)

    def remember(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        memory: Memory,
        *,
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"] | None = None,
        grad: bool = False,
    ) -> Memory:
        """Return the memory after a chunk, by one pass over it for its keys and values (alg. 1, line 21).

        The pass is clean, or at a level `sigma` (Self-Forcing's context noise), and has no graph unless `grad`.
        """
        frames, level = x_0.shape[1], x_0.new_zeros(len(x_0)) if sigma is None else sigma
        captured: LayerKeyValues = {}
        # only ODE and teacher-forcing training let gradients through the memory; in alg. 1 the cache is a constant
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            self._run_transformer(x_0, level, text, memory.commit_context(frames), captured)
        return memory.remember(split_frames(captured, memory.frame_count, frames))

    def read_context(self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"]) -> Memory:
        """Return a memory of these frames, by one clean pass in which they see each other and nothing else; it keeps its graph."""
        captured: LayerKeyValues = {}
        self._run_transformer(x_0, x_0.new_zeros(len(x_0)), text, None, captured)
        return fixed_memory(split_frames(captured, 0, x_0.shape[1]))

    def offer(
        self, x_t: Float[Tensor, "B F C H W"], sigma: Float[Tensor, " B"], text: Float[Tensor, "B T E"], memory: Memory
    ) -> tuple[Float[Tensor, "B F C H W"], Memory]:
        """Return x_0 as `forward` does, and the memory after it was offered this pass's keys (timing first_call)."""
        captured: LayerKeyValues = {}
        velocity = self._run_transformer(x_t, sigma, text, memory, captured)
        return to_x0(x_t, velocity, sigma), memory.offer(split_frames(captured, memory.frame_count, x_t.shape[1]))

    def remember_clip(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        spec: MemorySpec,
        *,
        chunk: int,
        share_key: ShareKey | None = None,
    ) -> Memory:
        """Return the memory after a clip that is passed chunk by chunk, as if the student had made it."""
        memory = empty_memory(spec, share_key)
        for part in x_0.split(chunk, dim=1):
            memory = self.remember(part, text, memory)
        return memory

    def _run_transformer(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None, captured: LayerKeyValues | None) -> Tensor:
        """Return the velocity, and fill `captured` if it is given; not otherwise, because a checkpointed pass would keep it all."""
        rope = self.transformer.rope
        rope.memory, rope.captured = memory, captured
        timestep = 1000 * sigma  # [B] or [B, F]
        if timestep.ndim == 2:  # diffusers takes a timestep for each token: [B, F * S]
            timestep = timestep.repeat_interleave(self._tokens_per_frame(x_t), dim=1)
        low = self.compute.dtype == "bfloat16"
        try:
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=low):
                # diffusers wants [B, C, F, H, W]
                velocity = self.transformer(x_t.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)
        finally:
            rope.memory, rope.captured = None, None
        return velocity.to(x_t.dtype)

    def _tokens_per_frame(self, x: Tensor) -> int:
        """Return S, the tokens of one latent frame."""
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)


def split_frames(captured: LayerKeyValues, first: int, frames: int) -> tuple[KeyValues, ...]:
    """Cut a pass's keys and values into its frames, of which the first has the number `first`: [B, F * S, N, D] to F of [B, S, N, D]."""
    # by layer first, as the pass gives them, then by frame, as a memory holds them
    layers = [(k.chunk(frames, dim=1), v.chunk(frames, dim=1)) for _, (k, v) in sorted(captured.items())]
    return tuple(KeyValues(first + f, tuple(k[f] for k, _ in layers), tuple(v[f] for _, v in layers)) for f in range(frames))
