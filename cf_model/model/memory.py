"""The slow-fast memory of sec. 3.3: what a causal model remembers of the frames before the current chunk.

    M = sink + slow + fast (the paper's S, C_slow and L_fast)

sink   the video's first frames, for ever
slow   first frames of chunks that differed from the chunk before them (surprisal, eq. 7), the newest `slow` of them
fast   the newest frames; the chunk that is being made counts into it

Each video of a batch decides for itself which of its chunks are news, so a batch remembers what its videos would alone.

A memory is a value: `remember` returns a new memory and nothing writes into the old one. That is what lets a rollout be
replayed, checkpointed and resumed; caches that are written in place give wrong gradients there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .key_values import Frames, mean_key, split_newest
from .positions import Positions, join_positions
from .slow_part import News, SlowPart, exclude_promoted


@dataclass(frozen=True)
class MemorySpec:
    """How many latent frames each part holds, which frames enter the slow part, and where RoPE places them."""

    sink: int
    slow: int
    fast: int  # counts the current chunk
    promote: Literal["similarity", "uniform", "random", "none"]
    tau: float  # eq. 7: a chunk less similar than this to the chunk before is news
    similarity: Literal["raw", "centred"]  # of the chunks' mean keys, or of what is left of them without the video's mean so far
    interval: int  # chunks between two that are tested (similarity, random) or promoted (uniform)
    begin: int  # number of the first chunk that may be promoted; chunk 0 is the sink
    keep: Literal["first", "all"]  # frames of a promoted chunk that enter the slow part
    when: Literal["evict", "enqueue"]  # promoted on leaving the fast part, or at once: then a frame is in both for a while
    timing: Literal["clean", "first_call"]  # tested by its clean keys, or by those of each noisy pass until one of them is news
    fill: Literal["none", "early_raw"]  # free places of the slow part: left out, or the video's first frames after the sink
    scope: Literal["global", "layer"]  # one decision for all layers, or one a layer
    positions: Literal["anchored", "fixed", "packed", "absolute"]  # see ContextMemory.query_positions
    commit: Literal["all", "fast"]  # what the clean pass over a finished chunk sees of the past (Commit Forcing: fast)

    def __post_init__(self) -> None:
        if self.fast < 1 or self.sink < 0 or self.slow < 0:
            raise ValueError(f"sink, slow and fast are {self.sink}, {self.slow}, {self.fast}; fast holds at least 1 frame, the others 0")
        if self.interval < 1 or self.begin < 1:
            raise ValueError(f"interval is {self.interval} and begin {self.begin} chunks; use 1 or more")
        if self.promote == "none" and self.slow:
            raise ValueError(f"slow is {self.slow} but promote is none, so it would stay empty; use slow: 0")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}, but it bounds a cosine; use a value in -1..1")
        if self.when == "evict" and (self.fill, self.timing) != ("none", "clean"):
            problem = f"fill is {self.fill} and timing {self.timing}, but when is evict"
            raise ValueError(f"{problem}; use when: enqueue, or fill: none and timing: clean, since only kept clean frames can wait")

    def is_tested(self, chunk: int) -> bool:
        """Say whether the chunk of this number is a candidate for the slow part."""
        return self.promote != "none" and chunk >= self.begin and chunk % self.interval == 0

    def check_chunk(self, chunk: int) -> None:
        """Raise ValueError for chunks of more latent frames than the fast part, which counts the current chunk."""
        if self.fast < chunk:
            raise ValueError(f"memory.fast is {self.fast}, but it counts the current chunk of {chunk} latent frames; use at least that")

    @property
    def size(self) -> int:
        """Latent frames that a pass can see, the current chunk among them."""
        return self.sink + self.slow + self.fast


@dataclass(frozen=True, eq=False)
class ContextMemory:
    """The memory M of sec. 3.3 of every video of a batch.

    Sink and fast part hold the same frames of every video, the slow part those that a video's own keys have promoted. Sink, slow
    and fast are disjoint and each in the order of time, unless `when` is enqueue or `fill` is early_raw. With scope layer the layers
    decide for themselves, and G below is their number; else G is 1.
    """

    spec: MemorySpec
    slow: SlowPart
    sink: Frames = ()
    early: Frames = ()  # fill: early_raw; the first `spec.slow` frames after the sink
    fast: Frames = ()
    pending: Mapping[int, News] = field(default_factory=dict)  # frames of the fast part that may be promoted when they leave it
    last_mean_key: Float[Tensor, "B layers ND"] | None = None  # of the pass that the next pass is compared with
    video_mean_key: Float[Tensor, "B layers ND"] | None = None  # similarity: centred; mean over the clean passes of all chunks so far
    mean_chunks: int = 0  # that it is a mean of
    frame_count: int = 0  # latent frames since the video began
    similarity: Float[Tensor, "B layers"] | None = None  # of the newest chunk to the chunk before, for the log
    noisy_passes: int = 0  # over the chunk that is being made (timing: first_call)
    is_promoted: News = False  # one of those passes has promoted the chunk
    is_newest_news: News | None = None  # decision on the newest chunk; None: not tested. For the log
    promoted_count: int | Tensor = 0  # frames promoted since the video began; [B, G] where videos differ

    @property
    def frames(self) -> Frames:
        """Everything that is held, in the order of RoPE positions (eq. 8): sink, slow, fast. Of the slow part all candidates."""
        return self.sink + self.slow.candidates + self.early[self.slow.places :] + self.fast

    @property
    def slow_places(self) -> int:
        """Places of the slow part in a pass, filled in some video; with early_raw the early frames fill those of the others."""
        return max(self.slow.places, len(self.early))

    @property
    def places(self) -> int:
        """Frames that a pass can attend to, empty places of the slow part among them."""
        return len(self.sink) + self.slow_places + len(self.fast)

    @property
    def groups(self) -> int:
        """Return G, the number of decisions for one video: 1, or with scope layer one a layer."""
        return self.slow.groups

    def frame_indices(self, video: int = 0, layer: int = 0) -> dict[str, list[int]]:
        """Return the latent frame numbers in each part of a video's memory, for people: on a GPU this waits for it."""
        promoted = self.list_promoted(video, layer)
        slow = promoted + [frame.index for frame in self.early[len(promoted) :]]
        return {"sink": [f.index for f in self.sink], "slow": slow, "fast": [f.index for f in self.fast]}

    def list_promoted(self, video: int = 0, layer: int = 0) -> list[int]:
        """Return the latent frame numbers that a video has promoted and still holds, for people."""
        return self.slow.list_frames(video, min(layer, self.groups - 1))

    def count_slow(self) -> Float[Tensor, ""]:
        """Count the frames of the slow part, as a mean over videos and layers, for the log."""
        promoted = torch.tensor(self.slow.places) if self.slow.count is None else self.slow.count
        return promoted.clamp(min=len(self.early)).double().mean()

    def past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys and the values that a layer attends to, to be joined along the tokens: [B, K * S, N, D] for K places.

        Their order is that of `key_positions`; `mask_empty` says which places hold a frame.
        """
        keys = [frame.keys[layer] for frame in self.sink]
        values = [frame.values[layer] for frame in self.sink]
        if self.slow_places:
            slow_keys, slow_values = self.read_slow(layer)
            keys.append(slow_keys.flatten(1, 2))
            values.append(slow_values.flatten(1, 2))
        keys += [frame.keys[layer] for frame in self.fast]
        values += [frame.values[layer] for frame in self.fast]
        return keys, values

    def read_slow(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the slow part's keys and values, [B, places, S, N, D]: promoted frames, then early frames where places are free."""
        if not self.early:
            return self.slow.read(layer)
        early = tuple(torch.stack([getattr(f, name)[layer] for f in self.early], dim=1) for name in ("keys", "values"))
        if not self.slow.places:
            return early[0], early[1]
        # Promoted frames overwrite the early frames from the left.
        filled = []
        for promoted, first in zip(self.slow.read(layer), early, strict=True):
            free = first[:, promoted.shape[1] :]
            if self.slow.order is not None:
                held = self.slow.mask_held()[:, min(layer, self.groups - 1), : first.shape[1], None, None, None]
                both = torch.where(held, promoted[:, : first.shape[1]], first[:, : promoted.shape[1]])
                promoted = torch.cat([both, promoted[:, first.shape[1] :]], dim=1)
            filled.append(torch.cat([promoted, free], dim=1))
        return filled[0], filled[1]

    def mask_empty(self, layer: int = 0) -> Bool[Tensor, "B K"] | None:
        """Return which remembered frames a layer may attend to, of those that `past` returns; None: all of them in every video."""
        if self.slow.order is None or not self.slow.places:
            return None
        held = self.slow.mask_held()[:, min(layer, self.groups - 1)]
        held = torch.cat([held, held.new_zeros(len(held), self.slow_places - held.shape[1])], dim=1)
        held = held | (torch.arange(self.slow_places, device=held.device) < len(self.early))
        before, after = (held.new_ones(len(held), len(part)) for part in (self.sink, self.fast))
        return torch.cat([before, held, after], dim=1)

    def remember(self, chunk: Frames, foreseen: ContextMemory | None = None) -> ContextMemory:
        """Return the memory after one more clean chunk; `foreseen` is what `foresee` gave for it, if a pass has looked at that already.

        `# Paper:` eq. 7: a chunk whose keys resemble those of the chunk before adds nothing and is forgotten when it
        leaves the fast part; of any other its first frame moves on to the slow part, whose oldest frame makes room.
        """
        spec = self.spec
        # eq. 7: is this chunk news? `candidates` are its frames that may enter the slow part.
        tested, news = self._test_news(chunk)
        candidates = self._choose_candidates(chunk)
        is_tested = spec.is_tested(self.frame_count // len(chunk))
        decision = (news | self.is_promoted) if is_tested else None
        news = exclude_promoted(news, self.is_promoted)
        if spec.when == "enqueue":
            tested, news = tested._promote(candidates, news), False
        waiting = {} if news is False else {frame.index: news for frame in candidates}
        # the frames of all parts; those of a foreseen memory are the same whatever eq. 7 has decided
        if foreseen is None:
            after = tested._enter(chunk, waiting)
        else:
            pending = {**foreseen.pending, **waiting}
            after = replace(foreseen, last_mean_key=tested.last_mean_key, similarity=tested.similarity, pending=pending)
        return replace(after._average_keys(), is_newest_news=decision)

    def foresee(self, chunk: Frames) -> ContextMemory | None:
        """Return the memory after a clean chunk as far as it does not depend on the chunk's keys; None where its frames do.

        The keys decide what becomes of the chunk when it leaves the fast part. So the next chunk's passes see the same frames whatever
        is decided, if the chunk stays there meanwhile: its keys may be made in the same pass as the next chunk's first step.
        """
        if self.spec.when != "evict" or self.spec.commit != "all":
            return None
        after = self._enter(chunk, {})
        return after if {frame.index for frame in chunk} <= {frame.index for frame in after.sink + after.fast} else None

    def _enter(self, chunk: Frames, waiting: Mapping[int, News]) -> ContextMemory:
        """Return the memory with a chunk in sink and fast part, whose oldest frames leave; `waiting`: its frames that may be promoted."""
        spec, length = self.spec, len(chunk)
        # The sink fills first and never changes afterwards.
        free = max(spec.sink - len(self.sink), 0)
        sink, rest = self.sink + chunk[:free], chunk[free:]
        # By frame index, not by free places: after a flush those places must stay empty, since the first frames are gone.
        early_count = sum(frame.index < spec.sink + spec.slow for frame in rest) if spec.fill == "early_raw" else 0
        early, rest = self.early + rest[:early_count], rest[early_count:]
        # The next chunk counts into the fast part, so what is left for the past is smaller by its length.
        leaving, fast = split_newest(self.fast + rest, max(spec.fast - length, 0))
        # Choice: promoted when it leaves the fast part, not when it is tested, so that no frame is there twice.
        pending = {**self.pending, **waiting}
        after = self
        for frame in leaving:
            after = after._promote((frame,), pending.get(frame.index, False))
        pending = {frame.index: pending[frame.index] for frame in fast if frame.index in pending}
        # ready for the next chunk, of which no pass was offered yet
        count = self.frame_count + length
        return replace(after, sink=sink, early=early, fast=fast, pending=pending, frame_count=count, noisy_passes=0, is_promoted=False)

    def offer(self, chunk: Frames) -> ContextMemory:
        """Return the memory after one pass over a chunk that is still noisy; only timing first_call looks at its keys.

        The chunk's first pass is compared with the clean pass of the chunk before, a later pass (the clean pass, too) with
        the pass before it, until two differ; the keys and values of that pass are promoted (docs/method.md, "Promotion").
        """
        if self.spec.timing != "first_call":
            return self
        tested, news = self._test_news(chunk)
        after = tested._promote(self._choose_candidates(chunk), exclude_promoted(news, self.is_promoted))
        return replace(after, noisy_passes=self.noisy_passes + 1, is_promoted=news | self.is_promoted)

    def _choose_candidates(self, chunk: Frames) -> Frames:
        """Return the frames of a chunk that enter the slow part if it is news."""
        # frames that fill the sink are remembered anyway
        beyond_sink = chunk[max(self.spec.sink - len(self.sink), 0) :]
        return beyond_sink if self.spec.keep == "all" else beyond_sink[:1]

    def _test_news(self, chunk: Frames) -> tuple[ContextMemory, News]:
        """Compare a pass with the pass before; return the memory that knows it, and whether it is news."""
        mean = mean_key(chunk)  # [B, layers, N * D]
        similarity = None  # sim(k_t, k_(t-1)) of eq. 7, one cosine a layer
        if self.last_mean_key is not None:
            # Choice: centred leaves out what all keys of the video so far share, as else the cosine tells videos apart, not chunks.
            shared = 0.0 if self.video_mean_key is None else self.video_mean_key
            similarity = F.cosine_similarity(mean - shared, self.last_mean_key - shared, dim=-1)
        # The log wants a chunk's first pass against the chunk before; later passes are compared with the chunk's own.
        tested = replace(self, last_mean_key=mean, similarity=self.similarity if self.noisy_passes else similarity)
        # A chunk that lies wholly in the sink has no frame to promote.
        return tested, bool(self._choose_candidates(chunk)) and self._is_news(self.frame_count // len(chunk), similarity)

    def _average_keys(self) -> ContextMemory:
        """Return the memory after its newest pass, a clean one, has entered the video's mean key (similarity: centred)."""
        if self.spec.similarity == "raw" or self.last_mean_key is None:
            return self
        count = self.mean_chunks + 1
        mean = self.last_mean_key if self.video_mean_key is None else torch.lerp(self.video_mean_key, self.last_mean_key, 1 / count)
        return replace(self, video_mean_key=mean, mean_chunks=count)

    def _is_news(self, chunk: int, similarity: Float[Tensor, "B layers"] | None) -> News:
        """Decide by eq. 7 (similarity below tau), or by one of the rules that experiments put in its place."""
        # Choice: "at 2-chunk intervals" tests every second chunk against its immediate predecessor; it gives the one
        # latent in 24 frames of the teacher's data and the 20 seconds that the paper claims.
        spec = self.spec
        if not spec.is_tested(chunk):
            return False
        if spec.promote == "similarity":
            if similarity is None:
                return False
            # Choice: with scope global the layers' cosines are averaged to one decision a video.
            return (similarity if spec.scope == "layer" else similarity.mean(dim=1, keepdim=True)) < spec.tau
        if spec.promote == "random":
            return random.Random(f"chunk {chunk}").random() < 0.5  # from the chunk's number alone, so a memory stays a value
        return spec.promote == "uniform"

    def _promote(self, frames: Frames, news: News) -> ContextMemory:
        """Return the memory with these frames in the slow part of the videos to which they are news."""
        if news is False or not self.spec.slow:
            return self
        count = self.promoted_count + len(frames) * (news.long() if isinstance(news, Tensor) else 1)
        return replace(self, slow=self.slow.promote(frames, news), promoted_count=count)

    def commit_context(self, frames: int) -> ContextMemory:
        """Return what the clean pass over the newest `frames` frames may look at (setting `commit`)."""
        if self.spec.commit == "all":
            return self
        # by frame index, wherever a frame is stored: the newest frames that fit beside the chunk
        first = self.frame_count - max(self.spec.fast - frames, 0)
        recent = tuple(frame for frame in self.sink + self.early + self.fast if frame.index >= first)
        return replace(self, sink=(), slow=SlowPart(self.spec.slow), early=(), fast=recent)

    def flushed(self, recent: int) -> ContextMemory:
        """Return only the sink and the newest `recent` frames: the KV flush of Infinity-RoPE at a change of prompt."""
        # the early frames count among the newest while the video is short
        fast = split_newest(self.early + self.fast, recent)[1]
        pending = {frame.index: self.pending[frame.index] for frame in fast if frame.index in self.pending}
        return replace(self, slow=SlowPart(self.spec.slow), early=(), fast=fast, pending=pending)

    def restarted(self, first: int, keep_sink: bool) -> ContextMemory:
        """Return a memory of the sink or of nothing, to be filled again from latent frame `first` on: LongLive's KV recache."""
        empty = replace(empty_memory(self.spec), frame_count=first, promoted_count=self.promoted_count)
        return replace(empty, sink=self.sink) if keep_sink else empty

    def query_positions(self, frames: int, layer: int = 0) -> Positions:
        """Return the temporal RoPE indices of the next `frames` frames: the end of eq. 8's window unless `positions` says otherwise.

        fixed is eq. 8 from the first chunk on, packed counts the remembered frames, absolute is the frame's own number.
        """
        spec = self.spec
        if spec.positions == "packed":
            return self._shift_by_slow(len(self.sink) + len(self.fast), frames, layer)
        if spec.positions == "absolute":
            first = self.frame_count
        elif spec.positions == "anchored":
            # Choice: until the memory has filled, frames sit where they would without bounds, as the models were
            # trained; from then on the window's end is where eq. 8 has it.
            first = min(self.frame_count, spec.size - frames)
        else:
            first = spec.size - frames
        return list(range(first, first + frames))

    def key_positions(self, frames: int, layer: int = 0) -> Positions:
        """Return the temporal RoPE index of every remembered frame, in the order of `past`, for the next `frames` frames."""
        return join_positions(*self.part_positions(frames, layer))

    def part_positions(self, frames: int, layer: int = 0) -> tuple[list[int], Positions, Positions]:
        """Return the temporal RoPE indices of sink, slow part and fast part for the next `frames` frames."""
        sink, fast, places = range(len(self.sink)), len(self.fast), range(self.slow_places)
        if self.spec.positions == "absolute":
            return [frame.index for frame in self.sink], self._number_slow(layer), [frame.index for frame in self.fast]
        if self.spec.positions == "packed":
            return list(sink), [len(sink) + n for n in places], self._shift_by_slow(len(sink), fast, layer)
        # eq. 8: the sink from 0 on, the slow part after the sink's places, the fast part just before the current chunk.
        query = self.query_positions(frames)
        assert isinstance(query, list)
        return list(sink), [self.spec.sink + n for n in places], list(range(query[0] - fast, query[0]))

    def number_frames(self, layer: int = 0) -> Positions:
        """Return the latent frame number of every remembered frame, in the order of `past`."""
        return join_positions([frame.index for frame in self.sink], self._number_slow(layer), [frame.index for frame in self.fast])

    def _number_slow(self, layer: int) -> Positions:
        """Return the latent frame number in every place of the slow part."""
        early = [frame.index for frame in self.early]
        if self.slow.index is None:
            return [frame.index for frame in self.slow.candidates] + early[self.slow.places :]
        group, places = min(layer, self.groups - 1), self.slow.places
        numbers, held = self.slow.index[:, group, :places], self.slow.mask_held()[:, group]
        first = torch.tensor((early + [0] * places)[:places], device=numbers.device)
        return join_positions(torch.where(held, numbers, first), early[places:])

    def _shift_by_slow(self, first: int, frames: int, layer: int) -> Positions:
        """Return the positions of `frames` frames from `first` on, moved up by the number of frames in a video's slow part."""
        if self.slow.count is None:
            return list(range(first + self.slow_places, first + self.slow_places + frames))
        held = self.slow.count[:, min(layer, self.groups - 1), None].clamp(min=len(self.early))
        return first + held + torch.arange(frames, device=held.device)


Memory = ContextMemory


@dataclass(frozen=True)
class ChunkComparison:
    """A chunk beside the chunk before it, as eq. 7 compares them: tensors, because reading them would wait for the GPU."""

    similarity: Float[Tensor, "B layers"]  # of their mean keys
    decisions: News | None  # whether the chunk is news, [B, G]; None: not tested


def compare_newest_chunk(memory: Memory) -> tuple[ChunkComparison, ...]:
    """Return the comparison of the newest chunk; () for a video's first chunk, which has none before it."""
    return () if memory.similarity is None else (ChunkComparison(memory.similarity, memory.is_newest_news),)


def empty_memory(spec: MemorySpec) -> Memory:
    """Return the memory before a video's first chunk."""
    return ContextMemory(spec, SlowPart(spec.slow))
