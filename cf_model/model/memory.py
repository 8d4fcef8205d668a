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
    """Keys (before rotation) and values of one latent frame: one [B, S, N, D] tensor a layer; detached but in causal_init."""

    index: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Frames = tuple[Frame, ...]


@dataclass(frozen=True, eq=False)
class ContextMemory:
    """Sink, slow and fast are disjoint, and each in the order of time."""

    spec: MemorySpec
    sink: Frames = ()
    slow: Frames = ()
    fast: Frames = ()
    news: tuple[int, ...] = ()  # indices of frames in fast that go on to the slow part when they leave
    last: Tensor | None = None  # mean key of the chunk before, what the next one is compared with
    seen: int = 0  # frames since the video began
    similarity: float | None = None  # of the newest chunk to the one before, for the log

    @property
    def frames(self) -> Frames:
        return self.sink + self.slow + self.fast

    def remember(self, chunk: Frames) -> ContextMemory:
        """The memory after one more clean chunk.

        `# Paper:` eq. 7: a chunk whose keys resemble those of the chunk before adds nothing and is forgotten when it
        leaves the fast part; of any other its first frame moves on to the slow part, whose oldest frame makes room.
        """
        spec, length = self.spec, len(chunk)
        mean = mean_key(chunk)
        similarity = None if self.last is None else float(F.cosine_similarity(mean, self.last, dim=-1).mean())
        room = max(spec.sink - len(self.sink), 0)
        sink, rest = self.sink + chunk[:room], chunk[room:]
        news = self.news
        if rest and self._is_news(self.seen // length, similarity):
            news = (*news, rest[0].index)
        # the next chunk counts into the fast part, so what is left for the past is smaller by its length
        leaving, fast = split(self.fast + rest, max(spec.fast - length, 0))
        # Choice: promoted when it leaves the fast part, not when it is tested, so that no frame is there twice.
        promoted = tuple(frame for frame in leaving if frame.index in news)
        slow = (self.slow + promoted)[-spec.slow :] if spec.slow else ()
        news = tuple(frame.index for frame in fast if frame.index in news)
        return replace(self, sink=sink, slow=slow, fast=fast, news=news, last=mean, seen=self.seen + length, similarity=similarity)

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
        query = self.query_positions(frames)[0]
        return [
            *range(len(self.sink)),
            *range(self.spec.sink, self.spec.sink + len(self.slow)),
            *range(query - len(self.fast), query),
        ]


def split(frames: Frames, keep: int) -> tuple[Frames, Frames]:
    """All but the last `keep` frames, and those."""
    return frames[: len(frames) - keep], frames[max(len(frames) - keep, 0) :]


def mean_key(chunk: Frames) -> Tensor:
    """Keys of the batch's first video, averaged over the chunk's tokens, in each layer: [layers, N * D].

    Choice: one decision for all layers (the mean of their cosines) and for the whole batch (its first video's). Layers
    that decide on their own would remember different frames, and the teacher could not be shown the same ones. An
    average over videos would be smoother than any one of them, and training would promote what inference does not.
    """
    layers = range(len(chunk[0].keys))
    return torch.stack([torch.stack([f.keys[layer][0] for f in chunk]).float().mean(dim=(0, 1)).flatten() for layer in layers]).detach()
