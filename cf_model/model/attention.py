"""What the self-attentions of a pass look at: the pass's own frames, and everything remembered.

diffusers hands what `rope` returns to the self-attention of every block untouched, so `rope` hands over the memory as well.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .key_values import Frames, LayerKeyValues
from .memory import Memory, join_positions
from .rope import Rotation, apply_rope, read_rotations
from .store import SlotStore, read_filled

NATIVE = "native"  # torch's own kernel


class JoinedPast:
    """Remembered frames as a pass with gradient attends to them: joined anew in every layer, so that the pass can be made again.

    The memory may have a graph, and a checkpointed block must find in the backward pass what it found before; a store has neither.
    """

    def __init__(self, memory: Memory, rotations: list[Rotation], masks: list[Tensor | None], own: int, takes_mask: bool) -> None:
        self.memory, self.rotations, self.masks = memory, rotations, masks  # of remembered and own tokens; for each group or for all
        self.filled: list[Tensor] | None = None  # numbers of the remembered tokens that a kernel without masks is shown
        if not takes_mask:
            tokens = [
                torch.ones(1, at.shape[1], dtype=torch.bool, device=at.device) if mask is None else mask[:, 0, 0]
                for at, mask in zip(rotations, masks, strict=True)
            ]
            filled = [read_filled(each) for each in tokens]
            self.rotations = [rotation[:, at] for rotation, at in zip(rotations, filled, strict=True)]
            self.filled, self.masks = [at[:-own] for at in filled], [None] * len(masks)

    def join(self, layer: int, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys at their places, the values and the mask that a pass attends to, its own last: the KV cache of alg. 1."""
        keys, values = self.memory.past(layer)
        group = min(layer, len(self.rotations) - 1)
        if self.filled is not None:
            at = self.filled[group]
            keys, values = [torch.cat(keys, dim=1)[:, at]], [torch.cat(values, dim=1)[:, at]]
        return apply_rope(torch.cat([*keys, k], dim=1), self.rotations[group]), torch.cat([*values, v], dim=1), self.masks[group]


@dataclass(eq=False)
class PassView:
    """What one pass's self-attentions look at. Travels through diffusers where a table of rotations would."""

    past: SlotStore | JoinedPast | None  # None: nothing is remembered
    rotations: list[Rotation]  # of the pass's own frames: one for each layer, or a single one for all
    captured: LayerKeyValues | None  # filled with this pass's keys and values; None: they are not wanted
    mask: Tensor | None = None  # which of its own tokens a pass without a memory attends to, [B, 1, 1, F * S]; None: all
    last: int | None = None  # layer after whose keys and values the pass may stop, since nothing else of it is wanted

    def rotation(self, layer: int) -> Rotation:
        """Return a layer's rotation of the pass's own queries and keys."""
        return self.rotations[min(layer, len(self.rotations) - 1)]

    def join_past(self, layer: int, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys, values and mask of all that a layer attends to; k and v are the pass's own, k at its places."""
        if self.past is None:
            return k, v, self.mask
        assert isinstance(self.past, SlotStore)
        return self.past.write_own(layer, k, v)


class MemoryRope(nn.Module):
    """Stand-in for diffusers' rope that gives each remembered frame the temporal position of eq. 8."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: Memory | None = None
        self.captured: LayerKeyValues | None = None
        self.filled: Tensor | None = None  # [B, F], which frames of a pass without a memory a video has; None: all
        self.last: int | None = None  # see PassView
        self.takes_mask = True  # whether the attention kernel does
        self._stores: weakref.WeakKeyDictionary[Memory, SlotStore] = weakref.WeakKeyDictionary()

    def forward(self, x: Float[Tensor, "B C F H W"]) -> PassView:
        """Return what the self-attentions of the pass over `x` look at, and its rotations."""
        frames, memory = x.shape[2], self.memory
        # without a memory: plain Wan, whose frames are at 0, 1, 2, …
        if memory is None:
            if self.filled is None:
                return PassView(None, [read_rotations(self.table, range(frames), x)], self.captured, None, self.last)
            # A frame that a video does not have takes no time, and nothing attends to it.
            own = read_rotations(self.table, (self.filled.long().cumsum(dim=1) - 1).clamp(min=0), x)
            mask = _spread_mask(self.filled, 0, own.shape[1] // frames)
            return PassView(None, [own], self.captured, mask, self.last)
        if memory.places and not torch.is_grad_enabled():
            store = self._open_store(memory, x)
            return PassView(store, store.rotations, self.captured, None, self.last)
        # With scope layer the layers remember different frames, so each may have positions of its own.
        groups = range(memory.groups)
        queries = [read_rotations(self.table, memory.query_positions(frames, group), x) for group in groups]
        return PassView(self._join_past(memory, x) if memory.places else None, queries, self.captured, None, self.last)

    def _join_past(self, memory: Memory, x: Tensor) -> JoinedPast:
        """Return a memory as a pass with gradient over `x` attends to it."""
        groups, frames = range(memory.groups), x.shape[2]
        positions = (join_positions(memory.key_positions(frames, group), memory.query_positions(frames, group)) for group in groups)
        rotations = [read_rotations(self.table, both, x) for both in positions]
        tokens = rotations[0].shape[1] // (memory.places + frames)  # S
        masks = [_spread_mask(memory.mask_empty(group), frames, tokens) for group in groups]
        return JoinedPast(memory, rotations, masks, frames * tokens, self.takes_mask)

    def _open_store(self, memory: Memory, x: Tensor) -> SlotStore:
        """Return a memory's store for passes over chunks like `x`, the same for all passes until the memory is another."""
        store = self._stores.get(memory)
        if store is None or store.grid != x.shape[2:]:
            store = self._stores[memory] = SlotStore(self.table, x, self.takes_mask)
        if not store.is_placed:
            store.place(memory, x)
        return store

    def hand_over_store(self, before: Memory, after: Memory, written: Frames) -> None:
        """Let a memory's store follow it to the next; `written` are the new frames that its last pass has left in the store, or ()."""
        if (store := self._stores.pop(before, None)) is not None:
            store.adopt(written)
            self._stores[after] = store

    def forget_store(self, memory: Memory) -> None:
        """Let go of a memory's store, which holds a copy of everything remembered."""
        self._stores.pop(memory, None)


def _spread_mask(filled: Tensor | None, frames: int, tokens: int) -> Bool[Tensor, "B 1 1 L"] | None:
    """Return a mask over places, [B, K], as one over the tokens of all places and of the pass: [B, 1, 1, (K + F) * S]."""
    if filled is None:
        return None
    both = torch.cat([filled, filled.new_ones(len(filled), frames)], dim=1)
    return both[:, None, None, :, None].expand(-1, -1, -1, -1, tokens).flatten(3)


def attend(
    q: Float[Tensor, "B L N D"], k: Float[Tensor, "B K N D"], v: Float[Tensor, "B K N D"], mask: Tensor | None, backend: str
) -> Float[Tensor, "B L N D"]:
    """Attend by a kernel that diffusers knows by this name.

    Causality is in what the memory holds, and the frames of a chunk see each other; a mask hides places that are still empty.
    """
    if backend == NATIVE:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    from diffusers.models.attention_dispatch import dispatch_attention_fn  # here, so that reading params needs no diffusers

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


class MemoryAttention:
    """Attention processor of diffusers, for passes with gradient: over the frames of the pass and over everything remembered."""

    def __init__(self, layer: int, backend: str) -> None:
        self.layer, self.backend = layer, backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: PassView | None = None):  # type: ignore[no-untyped-def]
        assert rotary_emb is not None
        # q, k, v [B, L, N, D], L = F * S tokens
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        # in bfloat16 the norm's answer is float32, which a memory need not hold
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        # before RoPE: positions are given anew whenever the keys are used
        if rotary_emb.captured is not None:
            rotary_emb.captured[self.layer] = (k, v)
        rotation, past = rotary_emb.rotation(self.layer), rotary_emb.past
        q = apply_rope(q, rotation).to(v.dtype)
        # [B, (K + F) * S, N, D] for K remembered frames
        if isinstance(past, JoinedPast):
            k, v, mask = past.join(self.layer, k, v)
        else:
            k, mask = apply_rope(k, rotation), rotary_emb.mask
        out = attend(q, k, v, mask, self.backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))
