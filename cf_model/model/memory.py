"""What a causal model remembers of the frames before the current chunk (sec. 3.3).

A memory is a value: `remember` returns a new one and nothing writes into the old. That is what lets a rollout be
replayed, checkpointed and resumed; in-place caches give wrong gradients there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MemorySpec:
    """How many latent frames each part holds, which frames the slow part keeps, and where RoPE places them."""

    sink: int
    slow: int
    fast: int  # counts the current chunk
    promote: Literal["similarity", "uniform", "none"]
    tau: float  # a chunk less similar than this to the one before it is news (eq. 7)
    interval: int  # every how many chunks one is tested (similarity) or kept (uniform)
    positions: Literal["anchored", "fixed", "packed", "absolute"]

    def __post_init__(self) -> None:
        if self.fast < 1 or self.sink < 0 or self.slow < 0:
            raise ValueError(f"sink, slow and fast are {self.sink}, {self.slow}, {self.fast}; fast holds at least 1 frame, the others 0")
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval} chunks; use 1 or more")
        if self.promote == "none" and self.slow:
            raise ValueError(f"slow is {self.slow} but promote is none, so it would stay empty; use slow: 0")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}, but it bounds a cosine; use a value in -1..1")

    @property
    def size(self) -> int:
        return self.sink + self.slow + self.fast


@dataclass(frozen=True, eq=False)
class Frame:
    """Keys (before rotation) and values of one latent frame: one detached [B, S, N, D] tensor a layer."""

    index: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Chunk = tuple[Frame, ...]


@dataclass(frozen=True, eq=False)
class ContextMemory:
    """Sink, slow and fast are disjoint and in the order of time; the fast part is what is left of the last chunks."""

    spec: MemorySpec
    sink: Chunk = ()
    slow: Chunk = ()
    fast: tuple[Chunk, ...] = ()  # whole chunks: one of them leaves at a time
    news: tuple[bool, ...] = ()  # of each chunk in fast: does its first frame go on to the slow part?
    last: Tensor | None = None  # mean key of the chunk before, what the next one is compared with
    seen: int = 0  # frames since the video began
    similarity: float | None = None  # of the newest chunk to the one before, for the log

    @property
    def frames(self) -> Chunk:
        return self.sink + self.slow + tuple(frame for chunk in self.fast for frame in chunk)

    def remember(self, chunk: Chunk) -> ContextMemory:
        """The memory after one more clean chunk.

        `# Paper:` eq. 7: a chunk whose keys resemble those of the chunk before adds nothing and is forgotten when it
        leaves the fast part; of any other its first frame moves on to the slow part, whose oldest frame makes room.
        """
        spec, length = self.spec, len(chunk)
        mean = mean_key(chunk)
        similarity = None if self.last is None else float(F.cosine_similarity(mean, self.last, dim=-1).mean())
        news = self._is_news(self.seen // length, similarity)
        room = spec.sink - len(self.sink)
        sink, rest = self.sink + chunk[: max(room, 0)], chunk[max(room, 0) :]
        fast, flags, slow = (*self.fast, rest), (*self.news, news and bool(rest)), self.slow
        # the current chunk counts into the fast part, so what is left for the past is smaller by its length
        while sum(map(len, fast)) > max(spec.fast - length, 0):
            leaving, fast, flag, flags = fast[0], fast[1:], flags[0], flags[1:]
            # Choice: promoted when it leaves the fast part, not when it is tested, so that no frame is there twice.
            if flag and spec.slow:
                slow = (*slow, leaving[0])[-spec.slow :]
        return replace(self, sink=sink, slow=slow, fast=fast, news=flags, last=mean, seen=self.seen + length, similarity=similarity)

    def _is_news(self, chunk: int, similarity: float | None) -> bool:
        # Choice: "at 2-chunk intervals" tests every second chunk against its immediate predecessor; it gives the one
        # latent in 24 frames of the teacher's data and the 20 seconds that the paper claims.
        due = chunk >= 1 and chunk % self.spec.interval == 0
        if self.spec.promote == "similarity":
            return due and similarity is not None and similarity < self.spec.tau
        return due and self.spec.promote == "uniform"

    def query_positions(self, frames: int) -> list[int]:
        """Temporal RoPE index of the frames that come next (eq. 8 unless absolute)."""
        spec = self.spec
        if spec.positions == "absolute":
            first = self.seen
        elif spec.positions == "packed":
            first = len(self.frames)
        elif spec.positions == "anchored":
            # Choice: until the memory has filled, frames sit where they would without bounds, as the models were
            # trained; from then on the window's end is where eq. 8 has it.
            first = min(self.seen, spec.size - frames)
        else:
            first = spec.size - frames
        return list(range(first, first + frames))

    def key_positions(self, frames: int) -> list[int]:
        """Temporal RoPE index of every remembered frame, in the order of `frames`, seen by the next `frames` frames."""
        if self.spec.positions == "absolute":
            return [frame.index for frame in self.frames]
        if self.spec.positions == "packed":
            return list(range(len(self.frames)))
        recent = sum(map(len, self.fast))
        query = self.query_positions(frames)[0]
        return [
            *range(len(self.sink)),
            *range(self.spec.sink, self.spec.sink + len(self.slow)),
            *range(query - recent, query),
        ]


def mean_key(chunk: Chunk) -> Tensor:
    """The chunk's keys, averaged over its tokens in each layer, [layers, B * N * D].

    Choice: one decision over all layers and the whole batch (the mean of the layers' cosines). Layers that decide on
    their own would remember different frames, and the teacher could not be shown the same ones.
    """
    return torch.stack(
        [torch.stack([frame.keys[layer] for frame in chunk]).float().mean(dim=(0, 2)).flatten() for layer in range(len(chunk[0].keys))]
    ).detach()
