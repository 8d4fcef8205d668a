"""What the self-attentions of a pass look at: the pass's own frames, and everything remembered.

diffusers hands what `rope` returns to the self-attention of every block untouched, so `rope` hands over the memory as well.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .kernels import attend
from .key_values import Frames, LayerKeyValues
from .memory import Memory
from .positions import join_positions
from .rope import Rotation, apply_rope, read_rotations
from .store import OwnPlace, SlotStore, read_filled


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

    _rows: list[Tensor] | None = None  # see `read_rows`

    def read_rows(self, layer: int, temb: Tensor, tables: list[Tensor]) -> list[Tensor]:
        """Return a block's shift, 1 + scale and gate of the self-attention and of the feed-forward, for the time embedding `temb`.

        The rows of all blocks are made by the first that asks, because one operation over all takes the time of one over a block's.
        With a level for each token they would be large, and a compiler does better with a block's own.
        """
        if temb.ndim == 4 or torch.is_grad_enabled() or torch.compiler.is_compiling() or hasattr(tables[layer], "ds_id"):
            shift, scale, gate, *ffn = (
                row.squeeze(2) if temb.ndim == 4 else row for row in (tables[layer] + temb.float()).chunk(6, dim=-2)
            )
            return [shift, 1 + scale, gate, ffn[0], 1 + ffn[1], ffn[2]]
        if self._rows is None:
            # [layers, 6, B, 1, N * D], from tables of [1, 6, N * D] and temb [B, 6, N * D]
            rows = torch.cat(tables)[:, :, None, None] + temb.float().transpose(0, 1)[:, :, None]
            rows[:, 1::3] += 1
            self._rows = list(rows.flatten(0, 1))
        return self._rows[6 * layer : 6 * layer + 6]

    def rotation(self, layer: int) -> Rotation:
        """Return a layer's rotation of the pass's own queries and keys."""
        return self.rotations[min(layer, len(self.rotations) - 1)]

    def capture(self, layer: int, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"]) -> None:
        """Keep a layer's keys, before RoPE, and values where they are wanted: positions are given anew whenever the keys are used."""
        if self.captured is not None:
            self.captured[layer] = (k, v)

    def attend_past(
        self, layer: int, q: Float[Tensor, "B L N D"] | None, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"], backend: str
    ) -> Tensor | None:
        """Attend from q, in a pass without gradient, to all that a layer sees; k and v are the pass's own, q and k at their places.

        Without q the own keys and values are written and that is all.
        """
        if not isinstance(self.past, SlotStore):
            return None if q is None else attend(q, k, v, self.mask, backend)
        keys, values, mask = self.past.write_own(layer, k, v)
        return None if q is None else attend(q, keys, values, mask, backend)


@dataclass(eq=False)
class MergedView(PassView):
    """What a pass over two chunks at once looks at: a finished chunk that is being remembered, and the first step of the next.

    The finished chunk is the first half of the batch, the next chunk the second. In every layer the first half attends to the old
    memory, then the store goes on to the next memory with the keys that were just made, and the second half attends to that.
    """

    before: OwnPlace | None = None  # of the finished chunk
    chunk: Frames = ()  # its frames, whose keys and values are lists that the pass fills

    def capture(self, layer: int, k: Float[Tensor, "B2 L N D"], v: Float[Tensor, "B2 L N D"]) -> None:
        """Give the frames of the finished chunk their keys and values of a layer; copied, because the next chunk's are not kept."""
        # [2B, F * S, N, D], of which the first B belong to the finished chunk
        videos, frames = len(k) // 2, len(self.chunk)
        for parts, whole in ((0, k), (1, v)):
            for frame, own in zip(self.chunk, whole[:videos].clone().chunk(frames, dim=1), strict=True):
                (frame.values if parts else frame.keys).append(own)  # type: ignore[attr-defined]

    def attend_past(
        self, layer: int, q: Float[Tensor, "B2 L N D"] | None, k: Float[Tensor, "B2 L N D"], v: Float[Tensor, "B2 L N D"], backend: str
    ) -> Tensor | None:
        """Attend as `PassView` does, first from the finished chunk, then from the next."""
        assert isinstance(self.past, SlotStore) and q is not None
        outs = []
        for half, own in enumerate((self.before, None)):
            if half:
                # alg. 1, line 21, is done in this layer: from here on its slots are those of the next memory
                self.past.bring_layer(layer)
            # each [B, L, N, D]
            q_half, k_half, v_half = (part.chunk(2)[half] for part in (q, k, v))
            outs.append(attend(q_half, *self.past.write_own(layer, k_half, v_half, own), backend))
        return torch.cat(outs)


class MemoryRope(nn.Module):
    """Stand-in for diffusers' rope that gives each remembered frame the temporal position of eq. 8."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table: Any = table  # diffusers' WanRotaryPosEmbed
        self.memory: Memory | SlotStore | None = None  # a store is one that is already brought to its memory
        self.captured: LayerKeyValues | None = None
        self.filled: Tensor | None = None  # [B, F], which frames of a pass without a memory a video has; None: all
        self.last: int | None = None  # see PassView
        self.next: tuple[Memory, Frames] | None = None  # of a pass over two chunks: the memory after the first, and its frames
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
        if isinstance(memory, SlotStore):
            return PassView(memory, memory.own.rotations, self.captured, None, self.last)
        if memory.places and not torch.is_grad_enabled():
            if self.next is not None:
                return self._merge_passes(memory, x)
            store = self.open_store(memory, x)
            return PassView(store, store.own.rotations, self.captured, None, self.last)
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

    def _merge_passes(self, memory: Memory, x: Float[Tensor, "B2 C F H W"]) -> MergedView:
        """Return what a pass over a finished chunk and the next one looks at, and leave the store with the memory after the first."""
        assert self.next is not None
        (after, chunk), part = self.next, x[: len(x) // 2]
        store = self.open_store(memory, part)
        # what the finished chunk's half goes on to see, while the store is brought to the next memory layer by layer
        before = store.own.copy()
        self.hand_over_store(memory, after, chunk)
        store.place(after, part, late=True)
        # rotations of both halves, [2B, L, 1, D / 2], for each group
        halves = [part.expand(len(x) // 2, -1, -1, -1) for pair in zip(before.rotations, store.own.rotations, strict=True) for part in pair]
        rotations = [torch.cat(halves[n : n + 2]) for n in range(0, len(halves), 2)]
        return MergedView(store, rotations, None, before=before, chunk=chunk)

    def can_merge(self, memory: Memory, after: Memory, x: Float[Tensor, "B C F H W"]) -> bool:
        """Say whether the store of a memory has room for the next, and as many groups: what is seen meanwhile must not be moved."""
        store = self._stores.get(memory)
        if store is None or store.grid != x.shape[2:] or not store.is_placed:
            return False
        return store.has_room(after, x.shape[2]) and memory.groups == after.groups and len(store.own.rotations) == after.groups

    def open_store(self, memory: Memory, x: Tensor) -> SlotStore:
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

    def rename_store(self, before: Memory, after: Memory) -> None:
        """Give a store that was already brought to a memory as it was foreseen to that memory as it is."""
        self._stores[after] = self._stores.pop(before)

    def change_kernel(self, *, takes_mask: bool) -> None:
        """Let the next passes use another attention kernel; stores are made anew where one takes masks and the other does not."""
        if takes_mask != self.takes_mask:
            self.takes_mask = takes_mask
            self._stores.clear()

    def forget_store(self, memory: Memory) -> None:
        """Let go of a memory's store, which holds a copy of everything remembered."""
        self._stores.pop(memory, None)


def _spread_mask(filled: Tensor | None, frames: int, tokens: int) -> Bool[Tensor, "B 1 1 L"] | None:
    """Return a mask over places, [B, K], as one over the tokens of all places and of the pass: [B, 1, 1, (K + F) * S]."""
    if filled is None:
        return None
    both = torch.cat([filled, filled.new_ones(len(filled), frames)], dim=1)
    return both[:, None, None, :, None].expand(-1, -1, -1, -1, tokens).flatten(3)


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
        rotary_emb.capture(self.layer, k, v)
        rotation, past = rotary_emb.rotation(self.layer), rotary_emb.past
        q = apply_rope(q, rotation).to(v.dtype)
        # [B, (K + F) * S, N, D] for K remembered frames
        if isinstance(past, JoinedPast):
            k, v, mask = past.join(self.layer, k, v)
        else:
            k, mask = apply_rope(k, rotation), rotary_emb.mask
        out = attend(q, k, v, mask, self.backend)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))
