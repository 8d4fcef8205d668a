"""The slow part of the memory (C_slow of sec. 3.3): each video's newest promoted frames, in tensors of one shape for all videos.

Videos of a batch decide for themselves, so they hold different frames and different numbers of frames. All of them share a list of
candidates; `order` says which of them a video holds. Decisions stay on the device: nothing here reads a tensor's value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .key_values import Frames, KeyValues

# A decision: of all videos and layers, or of each: [B, G], where G is 1 (scope global) or the number of layers (scope layer).
News = bool | Tensor
# Candidates beyond the slow part's size before the list is compacted, which copies `size` frames.
SPARE = 4


def exclude_promoted(news: News, promoted: News) -> News:
    """Return `news` without what was promoted before."""
    if news is False or promoted is True:
        return False
    return news if isinstance(promoted, bool) else news & ~promoted


@dataclass(frozen=True, eq=False)
class SlowPart:
    """Promoted frames of every video, oldest first. A value: `promote` returns a new one.

    Without `order` every video holds all candidates, as with promotion rules that do not look at the video.
    """

    size: int  # most frames that a video holds
    candidates: Frames = ()  # frames that some video may hold
    order: Int[Tensor, "B G size"] | None = None  # a video's frames as numbers of `candidates`; beyond `count` they mean nothing
    index: Int[Tensor, "B G size"] | None = None  # the same frames as latent frame numbers
    count: Int[Tensor, "B G"] | None = None  # frames that a video holds
    # How a store follows a slow part: it has the newest frame in the place of the one that was dropped, and learns what was added.
    turn: int | Tensor = 0  # frames dropped so far, modulo `size`; [B, G] where videos differ
    added: tuple[tuple[KeyValues, Tensor], ...] = ()  # the newest candidates, and to which videos and layers each was news, [B, G]
    added_count: int = 0  # candidates since the part was empty

    @property
    def places(self) -> int:
        """Most frames that a video can hold so far."""
        return min(self.size, len(self.candidates))

    @property
    def groups(self) -> int:
        """Return G, the number of decisions for one video: 1, or one a layer."""
        return 1 if self.order is None else self.order.shape[1]

    def promote(self, frames: Frames, news: News) -> SlowPart:
        """Add frames where they are `news`; a video whose places are taken drops its oldest frame for each."""
        if not self.size or news is False:
            return self
        copies = tuple(frame.copy() for frame in frames)
        if isinstance(news, bool):
            candidates = (*self.candidates, *copies)
            return replace(self, candidates=candidates[-self.size :], turn=(self.turn + max(len(candidates) - self.size, 0)) % self.size)
        part = self
        for frame in copies:
            part = part._append(frame, news)
        # One frame can be a candidate several times, with the keys of several passes (timing first_call), so its number does not tell them
        # apart: a video holds the candidate that was news to it.
        added = (*self.added, *((frame, news) for frame in copies))[-SPARE:]
        return replace(part, added=added, added_count=self.added_count + len(copies))

    def _append(self, frame: KeyValues, news: Bool[Tensor, "B G"]) -> SlowPart:
        """Add one candidate, and hold it in the videos to which it is news."""
        empty = news.new_zeros((*news.shape, self.size), dtype=torch.long)
        count = empty[..., 0] if self.count is None else self.count
        is_full, place = (count == self.size)[..., None], count.clamp(max=self.size - 1)[..., None]

        def put(number: int, held: Tensor | None) -> Tensor:
            """Write a number behind a video's others; a full video drops its first, and all others move up by one place."""
            before = empty if held is None else held
            moved = torch.where(is_full, before.roll(-1, dims=-1), before)
            return torch.where(news[..., None], moved.scatter(-1, place, number), before)

        part = replace(
            self,
            candidates=(*self.candidates, frame),
            order=put(len(self.candidates), self.order),
            index=put(frame.index, self.index),
            count=(count + news.long()).clamp(max=self.size),
            turn=(self.turn + (news & (count == self.size)).long()) % self.size,
        )
        return part._compact() if len(part.candidates) >= self.size + SPARE else part

    def _compact(self) -> SlowPart:
        """Return the same part with `size` candidates, of which the n-th holds every video's n-th frame."""
        assert self.order is not None
        layers = len(self.candidates[0].keys)
        keys = [self._pick([c.keys[layer] for c in self.candidates], layer) for layer in range(layers)]
        values = [self._pick([c.values[layer] for c in self.candidates], layer) for layer in range(layers)]
        # A compacted candidate is another frame in every video, so it has no number of its own.
        candidates = tuple(KeyValues(-1, tuple(k[:, n] for k in keys), tuple(v[:, n] for v in values)) for n in range(self.size))
        places = torch.arange(self.size, device=self.order.device)
        return replace(self, candidates=candidates, order=places.expand_as(self.order))

    def _pick(self, tensors: list[Tensor], layer: int) -> Tensor:
        """Return every video's frames of one layer: candidates of [B, S, N, D] to [B, places, S, N, D]."""
        assert self.order is not None
        rows = self.order[:, min(layer, self.groups - 1), : self.places]  # [B, places]
        videos = torch.arange(len(rows), device=rows.device)[:, None]
        return torch.stack(tensors, dim=1)[videos, rows]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, [B, places, S, N, D]; what stands beyond a video's `count` means nothing."""
        keys, values = [c.keys[layer] for c in self.candidates], [c.values[layer] for c in self.candidates]
        if self.order is None:
            return torch.stack(keys, dim=1), torch.stack(values, dim=1)
        return self._pick(keys, layer), self._pick(values, layer)

    def mask_held(self) -> Bool[Tensor, "B G places"]:
        """Return which places hold a frame."""
        assert self.count is not None
        return torch.arange(self.places, device=self.count.device) < self.count[..., None]

    def list_frames(self, video: int, group: int) -> list[int]:
        """Return the latent frame numbers that a video holds, for people: on a GPU this waits for it."""
        if self.index is None or self.count is None:
            return [frame.index for frame in self.candidates]
        return self.index[video, group, : int(self.count[video, group])].tolist()
