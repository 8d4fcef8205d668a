"""G_φ, s_real and s_fake of alg. 1: a diffusers Wan transformer that can look at a memory. All three are this class.

diffusers' model file is used as it is, because two of its seams are enough: the attention processor, and the `rope`
submodule, whose output every block hands to its self-attention untouched. So `rope` hands over the memory as well.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from .context import fixed_memory
from .flow import to_x0
from .key_values import Frames, LayerKeyValues, split_frames
from .memory import Memory, MemorySpec, Positions, empty_memory, join_positions
from .precision import WeightCopies, prepare_layers

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [1, L, 1, D]
Attention = Literal["native", "cudnn", "flash2", "flash3"]
Precision = Literal["float32", "bfloat16"]


# params.yaml's names of attention kernels: diffusers' names, and the package that each needs
BACKENDS = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "flash2": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
}
WITHOUT_MASK = ("flash2", "flash3")  # kernels that attend to all keys or to none


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


class PastView:
    """The remembered frames as the passes over one chunk attend to them: keys at their places, values, and which places are filled.

    The passes over a chunk share one view, so keys are rotated once a chunk. A layer's part is made when that layer first asks.
    """

    def __init__(self, rotations: list[Rotation], masks: list[Tensor | None], filled: list[Tensor] | None = None) -> None:
        self.masks, self.filled = masks, filled  # filled: numbers of the tokens that are left of those that a memory hands out
        self.rotations = rotations  # of the remembered frames and of the pass's own, for each layer or for all
        self._layers: LayerKeyValues = {}

    def join(self, memory: Memory, layer: int, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"]) -> tuple[Tensor, Tensor]:
        """Return the keys at their places and the values that a pass attends to, its own last: the KV cache of alg. 1."""
        cos, sin = self.rotations[min(layer, len(self.rotations) - 1)]
        if torch.is_grad_enabled():
            # Nothing is kept: a checkpointed block must do the same again, and the memory may have a graph.
            keys, values = self._read(memory, layer)
            return apply_rope(torch.cat([*keys, k], dim=1), (cos, sin)), torch.cat([*values, v], dim=1)
        own = k.shape[1]
        if layer not in self._layers:
            past_k, past_v = (torch.cat(part, dim=1) for part in self._read(memory, layer))
            self._layers[layer] = apply_rope(past_k, (cos[:, :-own], sin[:, :-own])), past_v
        past_k, past_v = self._layers[layer]
        return torch.cat([past_k, apply_rope(k, (cos[:, -own:], sin[:, -own:]))], dim=1), torch.cat([past_v, v], dim=1)

    def _read(self, memory: Memory, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a memory hands out, without its empty places where the kernel takes no mask."""
        keys, values = memory.past(layer)
        if self.filled is None:
            return keys, values
        left = self.filled[min(layer, len(self.filled) - 1)]
        return [torch.cat(keys, dim=1)[:, left]], [torch.cat(values, dim=1)[:, left]]

    def mask(self, layer: int) -> Tensor | None:
        """Return which keys a layer may attend to, the chunk's own among them: [B, 1, 1, (K + F) * S]; None: all."""
        return self.masks[min(layer, len(self.masks) - 1)]


def view_filled(rotations: list[Rotation], masks: list[Tensor | None], own: int) -> PastView:
    """Return a view without empty places, for kernels that take no mask: a chunk's decisions are read, for which a GPU is waited for.

    `own` counts the tokens of the pass itself, which are the last.
    Raises ValueError where the videos of a batch remember different numbers of frames.
    """
    filled, left = [], []
    for (cos, sin), mask in zip(rotations, masks, strict=True):
        tokens = torch.ones(1, cos.shape[1], dtype=torch.bool, device=cos.device) if mask is None else mask[:, 0, 0]
        at = read_filled(tokens)
        filled.append(at[:-own])
        left.append((cos[:, at], sin[:, at]))
    return PastView(left, [None] * len(masks), filled)


def read_filled(filled: Bool[Tensor, "B K"]) -> Tensor:
    """Return the numbers of the places that are filled, by reading them. Raises ValueError where the videos of a batch differ."""
    if not bool((filled == filled[:1]).all()):
        problem = "the videos of a batch remember different numbers of frames, which this attention kernel cannot be told"
        raise ValueError(f"{problem}; use attention: native or cudnn, or a batch of 1 a process (engine.micro_batch: 1)")
    return filled[0].nonzero()[:, 0]


@dataclass(eq=False)
class PassView:
    """What one pass's self-attentions look at. Travels through diffusers where a table of rotations would."""

    memory: Memory | None
    past: PastView | None  # the view of that memory; None: nothing is remembered
    rotations: list[Rotation]  # of the pass's own frames: one for each layer, or a single one for all
    captured: LayerKeyValues | None  # filled with this pass's keys and values; None: they are not wanted
    mask: Tensor | None = None  # which of its own tokens a pass without a memory attends to, [B, 1, 1, F * S]; None: all

    def own_rotation(self, layer: int) -> Rotation:
        """Return a layer's rotation of the pass's own queries and keys."""
        return self.rotations[min(layer, len(self.rotations) - 1)]


class MemoryRope(nn.Module):
    """Stand-in for diffusers' rope that gives each remembered frame the temporal position of eq. 8."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: Memory | None = None
        self.captured: LayerKeyValues | None = None
        self.filled: Tensor | None = None  # [B, F], which frames of a pass without a memory a video has; None: all
        self.takes_mask = True  # whether the attention kernel does
        # views by memory, each with the F, H, W of the passes that it serves
        self._views: weakref.WeakKeyDictionary[Memory, tuple[torch.Size, PastView]] = weakref.WeakKeyDictionary()

    def forward(self, x: Float[Tensor, "B C F H W"]) -> PassView:
        """Return what the self-attentions of the pass over `x` look at, and its rotations."""
        frames = x.shape[2]
        # without a memory: plain Wan, whose frames are at 0, 1, 2, …
        if self.memory is None:
            if self.filled is None:
                return PassView(None, None, [self.rotations(range(frames), x)], self.captured)
            # A frame that a video does not have takes no time, and nothing attends to it.
            own = [self.rotations((self.filled.long().cumsum(dim=1) - 1).clamp(min=0), x)]
            return PassView(None, None, own, self.captured, self._spread_mask(self.filled, 0, own[0][0].shape[1] // frames))
        # With scope layer the layers remember different frames, so each may have positions of its own.
        groups = range(self.memory.groups)
        own = [self.rotations(self.memory.query_positions(frames, group), x) for group in groups]
        return PassView(self.memory, self._view_past(self.memory, x), own, self.captured)

    def _view_past(self, memory: Memory, x: Tensor) -> PastView | None:
        """Return the view of a memory for passes over chunks like `x`, the same for all passes until `forget_view`."""
        if not memory.places:
            return None
        shape, view = self._views.get(memory, (None, None))
        if view is None or shape != x.shape[2:]:
            groups, frames = range(memory.groups), x.shape[2]
            positions = (join_positions(memory.key_positions(frames, group), memory.query_positions(frames, group)) for group in groups)
            rotations = [self.rotations(both, x) for both in positions]
            tokens = rotations[0][0].shape[1] // (memory.places + frames)  # S
            masks = [self._spread_mask(memory.mask_empty(group), frames, tokens) for group in groups]
            view = PastView(rotations, masks) if self.takes_mask else view_filled(rotations, masks, frames * tokens)
            self._views[memory] = x.shape[2:], view
        return view

    def _spread_mask(self, filled: Tensor | None, frames: int, tokens: int) -> Tensor | None:
        """Return a mask over places, [B, K], as one over the tokens of all places and of the pass: [B, 1, 1, (K + F) * S]."""
        if filled is None:
            return None
        both = torch.cat([filled, filled.new_ones(len(filled), frames)], dim=1)
        return both[:, None, None, :, None].expand(-1, -1, -1, -1, tokens).flatten(3)

    def forget_view(self, memory: Memory) -> None:
        """Let go of a memory's view, which holds a copy of everything remembered."""
        self._views.pop(memory, None)

    def rotations(self, positions: Positions | range, x: Tensor) -> Rotation:
        """Return cos and sin for frames at these temporal positions, each [1 or B, K * S, 1, D] for K positions."""
        t = self.table
        # S = h * w tokens of one latent frame
        h, w = x.shape[3] // t.patch_size[1], x.shape[4] // t.patch_size[2]
        if not isinstance(positions, Tensor):
            if min(positions) < 0:
                raise ValueError(f"frame {min(positions)} would lie before the video; memory.fast must hold at least the frames of a chunk")
            if max(positions) >= len(t.freqs_cos):
                last, rows = max(positions), len(t.freqs_cos)
                raise ValueError(f"frame {last} lies beyond the RoPE table of {rows} positions; use bounded positions")
            positions = torch.tensor([list(positions)], device=x.device)
        cos, sin = (self._select_rows(freqs, positions, h, w) for freqs in (t.freqs_cos, t.freqs_sin))
        return cos, sin

    def _select_rows(self, freqs: Tensor, at: Tensor, h: int, w: int) -> Tensor:
        """Return the table's rows for frames at the times `at` [B, K] and an h x w grid of tokens: [B, K * h * w, 1, D]."""
        t, (batch, frames) = self.table, at.shape
        # D is split into channels for time, row and column, as Wan splits it (128 = 44 + 42 + 42)
        # [positions, D] to a part for each axis; each part is spread over the two other axes
        time, row, column = freqs.split([t.t_dim, t.h_dim, t.w_dim], dim=1)
        parts = time[at].view(batch, frames, 1, 1, t.t_dim), row[:h].view(1, 1, h, 1, t.h_dim), column[:w].view(1, 1, 1, w, t.w_dim)
        grid = torch.cat([p.expand(batch, frames, h, w, -1) for p in parts], dim=-1)
        return grid.reshape(batch, -1, 1, t.attention_head_dim)


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
        rotation, past = rotary_emb.own_rotation(self.layer), rotary_emb.past
        q = apply_rope(q, rotation).to(v.dtype)
        # [B, (K + F) * S, N, D] for K remembered frames
        if past is None or rotary_emb.memory is None:
            k, mask = apply_rope(k, rotation), rotary_emb.mask
        else:
            (k, v), mask = past.join(rotary_emb.memory, self.layer, k, v), past.mask(self.layer)
        # causality is in what the memory holds, and the frames of a chunk see each other; a mask hides places that are still empty
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self.backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def apply_rope(x: Float[Tensor, "B L N D"], rotation: Rotation) -> Float[Tensor, "B L N D"]:
    """Rotate queries or keys (RoPE): channels 2i and 2i + 1 are a pair, as Wan stores them."""
    # diffusers' table holds each angle twice, so every second entry is enough; [B, L, N, D / 2] from here
    cos, sin = rotation[0][..., 0::2], rotation[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


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
        transformer.rope.takes_mask = compute.attention not in WITHOUT_MASK
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer, backend))
        prepare_layers(transformer, checkpointing=compute.checkpointing)
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel, which this file doesn't import
        self.compute, self.copies = compute, WeightCopies(transformer, wanted=compute.dtype == "bfloat16")

    def freeze(self) -> Denoiser:
        """Let nothing train this model any more, and keep the weights of its products in the width that they are used in."""
        self.requires_grad_(False)
        self.copies.narrow_originals()
        return self

    def load_state_dict(self, *given: Any, **named: Any) -> Any:
        self.copies.forget()
        return super().load_state_dict(*given, **named)

    def _apply(self, *given: Any, **named: Any) -> Any:
        self.copies.forget()  # the weights move to another device or type
        return super()._apply(*given, **named)

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
        filled: Bool[Tensor, "B F"] | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return v = ε - x_0. `sigma` is a level for each sample or for each frame; without `memory` the pass is plain Wan.

        `filled` says which frames of such a pass a video has; v of the others means nothing.
        """
        if filled is not None and not self.transformer.rope.takes_mask:
            left = read_filled(filled)  # the pass is over these frames alone
            velocity = self._run_transformer(x_t[:, left], sigma[:, left] if sigma.ndim == 2 else sigma, text, memory, None)
            return torch.zeros_like(x_t).index_copy(1, left, velocity)
        return self._run_transformer(x_t, sigma, text, memory, None, filled)

    def remember(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        memory: Memory,
        *,
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"] | None = None,
        grad: bool = False,
        disturb: Callable[[Frames], Frames] | None = None,
    ) -> Memory:
        """Return the memory after a chunk, by one pass over it for its keys and values (alg. 1, line 21).

        The pass is clean, or at a level `sigma` (Self-Forcing's context noise), and has no graph unless `grad`. `disturb` changes
        the keys and values before they are remembered (`cache_noise`).
        """
        frames, level = x_0.shape[1], x_0.new_zeros(len(x_0)) if sigma is None else sigma
        captured: LayerKeyValues = {}
        # only ODE and teacher-forcing training let gradients through the memory; in alg. 1 the cache is a constant
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            self._run_transformer(x_0, level, text, memory.commit_context(frames), captured)
        self.forget_view(memory)  # this was the chunk's last pass, but for a pass that noises it again
        chunk = split_frames(captured, memory.frame_count, frames)
        return memory.remember(disturb(chunk) if disturb else chunk)

    def forget_view(self, memory: Memory) -> None:
        """Let go of the copy of a memory that passes without gradient keep from one to the next."""
        self.transformer.rope.forget_view(memory)

    def read_context(
        self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"], filled: Bool[Tensor, "B F"] | None = None
    ) -> Memory:
        """Return a memory of these frames, by one clean pass in which they see each other and nothing else; it keeps its graph.

        `filled` says which of them a video has.
        """
        if filled is not None and not self.transformer.rope.takes_mask:
            x_0, filled = x_0[:, read_filled(filled)], None
        captured: LayerKeyValues = {}
        self._run_transformer(x_0, x_0.new_zeros(len(x_0)), text, None, captured, filled)
        return fixed_memory(split_frames(captured, 0, x_0.shape[1]), filled)

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
    ) -> Memory:
        """Return the memory after a clip that is passed chunk by chunk, as if the student had made it."""
        memory = empty_memory(spec)
        for part in x_0.split(chunk, dim=1):
            memory = self.remember(part, text, memory)
        return memory

    def _run_transformer(
        self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None, captured: LayerKeyValues | None, filled: Tensor | None = None
    ) -> Tensor:
        """Return the velocity, and fill `captured` if it is given; not otherwise, because a checkpointed pass would keep it all."""
        rope = self.transformer.rope
        rope.memory, rope.captured, rope.filled = memory, captured, filled
        timestep = 1000 * sigma  # [B] or [B, F]
        if timestep.ndim == 2:  # diffusers takes a timestep for each token: [B, F * S]
            timestep = timestep.repeat_interleave(self._tokens_per_frame(x_t), dim=1)
        low, copies, given = self.compute.dtype == "bfloat16", self.copies.read(), (x_t.transpose(1, 2), timestep, text)
        try:
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=low):
                velocity = functional_call(self.transformer, copies, given, {"return_dict": False}, tie_weights=False)[0].transpose(1, 2)
        finally:
            rope.memory, rope.captured, rope.filled = None, None, None
        return velocity.to(x_t.dtype)

    def _tokens_per_frame(self, x: Tensor) -> int:
        """Return S, the tokens of one latent frame."""
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)
