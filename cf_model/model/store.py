"""The store: what passes without gradient attend to, in slots that stay where they are while a video goes on.

A memory holds frames, which nothing ever changes: raw keys, by which eq. 7 decides, and values. A store holds them as attention reads
them, rotated keys and values in one tensor a layer each, so that no pass joins or rotates what another has. It follows one memory to the
next: a slot is written when its frame is another, and its key is rotated when the frame's position has changed, once a chunk.

Slots are numbered sink, fast part and own chunk, slow part, since only the slow part has empty places. Fast part and own chunk are a
ring, in which a chunk that was remembered stays where its last pass has written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .graphs import PassGraphs
from .key_values import Frames, KeyValues
from .memory import Memory
from .positions import Positions, join_positions
from .rope import Rotation, read_rotations, turn_keys
from .slow_part import SlowPart

T = TypeVar("T")
Held = tuple[KeyValues, int | None]  # a frame and its position; None: that of each video is its own


@dataclass(frozen=True)
class OwnPlace:
    """Where a pass over a chunk writes its keys and values, and what it attends to; entries of each group or of all."""

    slots: list[int]  # of the chunk's frames
    used: list[int]  # tokens that a pass attends to
    masks: list[Tensor | None]  # added to the scores, [B, 1, 1, slots * S]; None: nothing is
    rotations: list[Rotation]  # of the chunk's own tokens

    def copy(self) -> OwnPlace:
        """Return a copy that stays as it is when the store goes on to the next memory, which writes masks and rotations in place."""
        masks = [None if mask is None else mask.clone() for mask in self.masks]
        return OwnPlace(self.slots, self.used, masks, [rotation.clone() for rotation in self.rotations])


@dataclass(frozen=True)
class OwnSlots:
    """What a pass over a chunk writes in a layer and attends to, as views of the layer's slots, so that they are found once a chunk."""

    # of each piece of the chunk in slots that follow each other: its tokens, and its keys, as complex numbers, and values [B, L, N, *]
    parts: list[tuple[slice, Tensor, Tensor]]
    seen: tuple[Tensor, Tensor, Tensor | None]  # keys and values that the pass attends to, [B, N, L, D], and what is added to the scores


class SlotStore:
    """Rotated keys and values of a memory and of the chunk that sees it: [B, N, slots * S, D] a layer each.

    All addresses stay, as a captured pass needs, but that a store grows once to all the slots that a memory can need. The own chunk's
    slots go round in the ring, so there is one pass to capture for each of its places.
    """

    def __init__(self, table: Any, x: Float[Tensor, "B C F H W"], takes_mask: bool) -> None:
        self.table, self.grid, self.takes_mask = table, x.shape[2:], takes_mask
        self.tokens = (x.shape[3] // table.patch_size[1]) * (x.shape[4] // table.patch_size[2])  # S
        self.keys, self.values, self.slots = list[Tensor](), list[Tensor](), 0
        self.own = OwnPlace([], [0], [None], [])  # of the chunk that sees the memory
        self._views = dict[int, OwnSlots]()  # of layers in which a pass has written since the store was brought to its memory
        self.graphs = PassGraphs()  # passes over this store, if they are captured
        self.is_placed = False  # for the memory that it belongs to now
        self._held = dict[int, Held]()
        # of the slow part: what its slots were made from, its raw keys [B, N, places * S, D] and where its values are, a layer each
        self._source: tuple[Any, ...] | None = None
        self._raw, self._slow_values, self._places, self._added = list[Tensor](), list[Tensor](), 0, 0
        self._own_positions: Positions = []
        self._due = list[Callable[[int], None]]()  # what is still to be written in each layer

    def place(self, memory: Memory, x: Float[Tensor, "B C F H W"], *, late: bool = False) -> None:
        """Bring the slots to what passes over chunks like `x` see of a memory. The host reads nothing but for kernels without masks.

        `late`: a layer's slots are written by `bring_layer`, because a pass that comes there first still sees what they held.
        """
        frames = x.shape[2]
        first, fast = len(memory.sink), len(memory.fast)
        ring, places = fast + frames, memory.slow_places
        # a frame keeps its slot in a ring that is full; a ring that fills is in the order of time
        turn = (memory.frame_count - fast - memory.spec.sink) % ring if ring == memory.spec.fast else 0
        # slots of the sink's frames, of the fast part's, oldest first, and of the own chunk's
        slots = [*range(first), *(first + (n + turn) % ring for n in range(ring))]
        if first + ring + places > self.slots:
            self._grow(memory, first + ring + places)
        groups = range(memory.groups)
        self._place_frames(memory, slots[: first + fast], x)
        self._place_slow(memory, first + ring, x)
        self._own_positions = memory.query_positions(frames)
        rotations = [read_rotations(self.table, memory.query_positions(frames, group), x) for group in groups]
        # Written in place where they fit, because a captured pass reads them at the address that it was captured with.
        if [at.shape for at in rotations] == [at.shape for at in self.own.rotations]:
            for at, now in zip(self.own.rotations, rotations, strict=True):
                at.copy_(now)
            rotations = self.own.rotations
        self.own, self._views = replace(self.own, slots=slots[first + fast :], rotations=rotations), {}
        self.is_placed = True
        if not late:
            for layer in range(len(self.keys)):
                self.bring_layer(layer)

    def bring_layer(self, layer: int) -> None:
        """Write what is due in a layer's slots; the last layer is the last."""
        for write in self._due:
            write(layer)
        if layer == len(self.keys) - 1:
            self._due = []

    def has_room(self, memory: Memory, frames: int) -> bool:
        """Say whether a memory fits into the slots beside a chunk of so many frames, so that nothing that they hold is lost."""
        return bool(self.keys) and len(memory.sink) + len(memory.fast) + frames + memory.slow_places <= self.slots

    def _grow(self, memory: Memory, slots: int) -> None:
        """Make room: first for exactly so many slots, as a context needs that never grows, then for all that the memory can need."""
        self.slots = max(slots, memory.spec.size) if self.slots else slots
        like = memory.frames[0]

        def reserve(x: Float[Tensor, "B S N D"]) -> Float[Tensor, "B N T D"]:
            return x.new_empty(x.shape[0], x.shape[2], self.slots * self.tokens, x.shape[3])

        self.keys, self.values = [reserve(k) for k in like.keys], [reserve(v) for v in like.values]
        self.own, self._held, self._source = replace(self.own, masks=[None]), {}, None
        self.graphs = PassGraphs()

    def _place_frames(self, memory: Memory, slots: list[int], x: Tensor) -> None:
        """Write frames of sink and fast part into slots that held others, and rotate the keys of those that have moved."""
        parts = [memory.part_positions(x.shape[2], group) for group in range(memory.groups)]
        positions = [join_positions(sink, fast) for sink, _, fast in parts]
        shared = positions[0]
        held: dict[int, Held] = {}
        stale, new = list[int](), list[tuple[int, KeyValues]]()
        for place, (slot, frame) in enumerate(zip(slots, memory.sink + memory.fast, strict=True)):
            before, _ = was = self._held.get(slot, (None, None))
            held[slot] = frame, None if isinstance(shared, Tensor) else shared[place]
            # A frame never changes, so the values of a slot that holds the same frame as before are still right.
            if before is not frame:
                new.append((slot, frame))
            # Eq. 8 moves a frame as the memory fills; positions that differ between videos are taken to have changed.
            if before is not frame or held[slot][1] is None or held[slot] != was:
                stale.append(place)
        self._held = held
        moved = [at[:, stale] if isinstance(at, Tensor) else [at[place] for place in stale] for at in positions] if stale else []
        rotations = [read_rotations(self.table, at, x) for at in (moved if isinstance(shared, Tensor) else moved[:1])]
        frames = [held[slots[place]][0] for place in stale]

        def write(layer: int) -> None:
            # values of new frames, then keys of all frames that are new or have moved
            for slot, frame in new:
                self._write(self.values[layer], slot, frame.values[layer])
            if frames:
                # [B, stale * S, N, D]
                rotated = turn_keys(torch.cat([frame.keys[layer] for frame in frames], dim=1), _of_layer(rotations, layer))
                for n, place in enumerate(stale):
                    self._write(self.keys[layer], slots[place], rotated[:, n * self.tokens : (n + 1) * self.tokens])

        self._due.append(write)

    def _place_slow(self, memory: Memory, first: int, x: Tensor) -> None:
        """Bring the slots from `first` on to the slow part, where it may be another, and say which of them are filled in each video."""
        slow, places, groups = memory.slow, memory.slow_places, range(memory.groups)
        positions = [memory.part_positions(x.shape[2], group)[1] for group in groups]
        listed = None if isinstance(positions[0], Tensor) else tuple(positions[0])  # None: numbers of each video's own frames
        source = slow, memory.early, first, listed
        if source == self._source:
            return
        turns = [self._turn(slow, group, places) for group in groups]
        if places:
            # How many frames were added since the slots were filled: while all of them are still known, only they are written.
            new = slow.added_count - self._added
            follows = self._source is not None and source[1:3] == self._source[1:3] and 0 <= new <= len(slow.added)
            if follows and places == self._places and slow.order is not None:
                for frame, news in slow.added[len(slow.added) - new :]:
                    self._add_slow(slow, frame, news, turns)
            else:
                self._fill_slow(memory, first, places, turns)
            positions = [at if turn is None else _turn_positions(at, turn) for at, turn in zip(positions, turns, strict=True)]
            rotations = [read_rotations(self.table, at, x) for at in positions]
            raw = self._raw
            self._due.append(
                lambda layer: self._write(self.keys[layer], first, turn_keys(raw[layer].transpose(1, 2), _of_layer(rotations, layer)))
            )
        self._source, self._added, self._places = source, slow.added_count, places
        # [B, places] of each group, or None: all are filled
        filled = [memory.mask_empty(group) for group in groups]
        shown = [None if mask is None else mask[:, len(memory.sink) : len(memory.sink) + places] for mask in filled]
        used, masks = [(first + places) * self.tokens] * len(groups), self.own.masks
        if self.takes_mask:
            masks = [self._hide_empty(_of_layer(masks, group), mask, first) for group, mask in zip(groups, shown, strict=True)]
        else:
            used = [(first + (places if mask is None else len(read_filled(mask)))) * self.tokens for mask in shown]
        self.own = replace(self.own, used=used, masks=masks)

    def _turn(self, slow: SlowPart, group: int, places: int) -> Tensor | None:
        """Return which of a video's frames, oldest first, each slot holds: [1 or B, places]; None: they are in order.

        A full slow part is a ring, too: the newest frame is in the slot of the oldest, and all others stay.
        """
        if places < slow.size or (isinstance(slow.turn, int) and not slow.turn):
            return None
        device = self.keys[0].device
        turn = torch.tensor([[slow.turn]], device=device) if isinstance(slow.turn, int) else slow.turn[:, group, None]
        return (torch.arange(places, device=device) - turn) % slow.size

    def _fill_slow(self, memory: Memory, first: int, places: int, turns: list[Tensor | None]) -> None:
        """Write all of the slow part: its raw keys beside the slots, its values into them."""
        self._raw = raw = [keys.new_empty(*keys.shape[:2], places * self.tokens, keys.shape[3]) for keys in self.keys]
        at = slice(first * self.tokens, (first + places) * self.tokens)
        self._slow_values = [values[:, :, at].unflatten(2, (places, self.tokens)) for values in self.values]

        def write(layer: int) -> None:
            turn, parts = _of_layer(turns, layer), memory.read_slow(layer)  # [B, places, S, N, D]
            if turn is not None:
                videos = torch.arange(len(raw[layer]), device=raw[layer].device)[:, None]
                parts = parts[0][videos, turn], parts[1][videos, turn]
            self._write(raw[layer], 0, parts[0].flatten(1, 2))
            self._write(self.values[layer], first, parts[1].flatten(1, 2))

        self._due.append(write)

    def _add_slow(self, slow: SlowPart, frame: KeyValues, news: Bool[Tensor, "B G"], turns: list[Tensor | None]) -> None:
        """Write a frame into the slot that it has in each video to which it was news; the others keep what they have there."""
        assert slow.index is not None and slow.count is not None
        places = self._places
        videos = torch.arange(len(slow.count), device=slow.count.device)
        ways = list[tuple[Tensor, Tensor]]()  # of each group: the slot in each video, [B], and whether it is to be written
        for group, turn in enumerate(turns):
            held = (slow.index[:, group, :places] == frame.index) & (videos.new_tensor(range(places)) < slow.count[:, group, None])
            held = held if turn is None else held.gather(1, turn)
            is_new = held.any(dim=1) & news[:, min(group, news.shape[1] - 1)]
            ways.append((held.long().argmax(dim=1), is_new[:, None, None, None]))
        all_raw, all_values = self._raw, self._slow_values

        def write(layer: int) -> None:
            # slot [B] and is_new [B, 1, 1, 1]: each video's own
            slot, is_new = _of_layer(ways, layer)
            raw = all_raw[layer].unflatten(2, (places, self.tokens))  # [B, N, places, S, D]
            for slots, tokens in ((raw, frame.keys[layer]), (all_values[layer], frame.values[layer])):
                slots[videos, :, slot] = torch.where(is_new, tokens.transpose(1, 2), slots[videos, :, slot])

        self._due.append(write)

    def _hide_empty(self, mask: Tensor | None, filled: Bool[Tensor, "B places"] | None, first: int) -> Tensor | None:
        """Return what is added to the scores: minus infinity in the empty places of the slow part, else 0."""
        if filled is None:
            return None
        # Adding is faster on a CPU than choosing by a mask of truth values, which is turned to this at every call.
        if mask is None:
            mask = self.keys[0].new_empty(len(filled), 1, 1, self.slots * self.tokens)
        tokens = filled[:, None, None, :, None].expand(-1, 1, 1, -1, self.tokens).flatten(3)
        mask.zero_()[..., first * self.tokens : first * self.tokens + tokens.shape[3]].masked_fill_(~tokens, -torch.inf)
        return mask

    def _write(self, slots: Tensor, first: int, tokens: Float[Tensor, "B L N D"]) -> None:
        """Copy tokens into the slots from `first` on."""
        at = first * self.tokens
        slots[:, :, at : at + tokens.shape[1]].copy_(tokens.transpose(1, 2))

    def write_own(
        self, layer: int, k: Float[Tensor, "B L N D"], v: Float[Tensor, "B L N D"], own: OwnPlace | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write a pass's own keys, at their places, and values; `own` is where, if not where the store was brought to last.

        Returns the keys and values that the pass attends to, [B, L, N, D], and what is added to their scores.
        """
        place = own or self.own
        for part, slot in self._list_pieces(place.slots):
            self._write(self.keys[layer], slot, k[:, part])
            self._write(self.values[layer], slot, v[:, part])
        keys, values, mask = self._view_seen(layer, place)
        return keys.transpose(1, 2), values.transpose(1, 2), mask

    def turn_own(self, layer: int, k: Tensor, rotation: Rotation, v: Float[Tensor, "B L N D"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotate a pass's own keys, complex numbers [B, L, N, D / 2], into the slots where `write_own` would copy them, and write values.

        Returns what the pass attends to as `write_own` does, but keys and values as they lie: [B, N, L, D].
        """
        views = self._views.get(layer) or self._view_own(layer)
        if len(views.parts) == 1:
            _, keys, values = views.parts[0]
            torch.mul(k, rotation, out=keys)
            values.copy_(v)
            return views.seen
        for part, keys, values in views.parts:
            torch.mul(k[:, part], rotation[:, part], out=keys)
            values.copy_(v[:, part])
        return views.seen

    def _view_own(self, layer: int) -> OwnSlots:
        """Find the views of a layer's slots that `turn_own` writes."""
        parts = list[tuple[slice, Tensor, Tensor]]()
        for part, slot in self._list_pieces(self.own.slots):
            # [B, L, N, D] of both, and of the keys [B, L, N, D / 2] complex, in the layer's own memory
            at = slice(slot * self.tokens, slot * self.tokens + part.stop - part.start)
            keys, values = (slots[layer][:, :, at].transpose(1, 2) for slots in (self.keys, self.values))
            parts.append((part, torch.view_as_complex(keys.unflatten(3, (-1, 2))), values))
        views = self._views[layer] = OwnSlots(parts, self._view_seen(layer, self.own))
        return views

    def _view_seen(self, layer: int, place: OwnPlace) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values of a layer that a pass attends to, [B, N, L, D], and what is added to their scores."""
        used, mask = _of_layer(place.used, layer), _of_layer(place.masks, layer)
        keys, values = (part[layer][:, :, :used] for part in (self.keys, self.values))
        return keys, values, None if mask is None else mask[..., :used]

    def _list_pieces(self, slots: list[int]) -> Iterator[tuple[slice, int]]:
        """Yield the tokens of each piece of a chunk whose slots follow each other, and its first slot: it may go over the ring's end."""
        start = 0
        while start < len(slots):
            end = start + 1
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            yield slice(start * self.tokens, end * self.tokens), slots[start]
            start = end

    def adopt(self, chunk: Frames) -> None:
        """Take over the next memory, in which these frames are what the last pass has written into the own chunk's slots; () if not."""
        at = self._own_positions
        if chunk:
            numbers = [None] * len(chunk) if isinstance(at, Tensor) else at
            self._held |= dict(zip(self.own.slots, zip(chunk, numbers, strict=True), strict=True))
        self.is_placed = False


def _turn_positions(positions: Positions, turn: Tensor) -> Tensor:
    """Return the positions of slots, of which each holds the frame of this place."""
    at = torch.as_tensor(positions, device=turn.device)
    return at[turn] if at.ndim == 1 else at.gather(1, turn.expand(len(at), -1))


def _of_layer(groups: list[T], layer: int) -> T:
    """Return what belongs to a layer, of one entry a layer or one for all."""
    return groups[min(layer, len(groups) - 1)]


def read_filled(filled: Bool[Tensor, "B K"]) -> Tensor:
    """Return the numbers of the places that are filled, by reading them. Raises ValueError where the videos of a batch differ."""
    if not bool((filled == filled[:1]).all()):
        problem = "the videos of a batch remember different numbers of frames, which this attention kernel cannot be told"
        raise ValueError(f"{problem}; use attention: native or cudnn, or a batch of 1 a process (engine.micro_batch: 1)")
    return filled[0].nonzero()[:, 0]
