"""The slow-fast memory of sec. 3.3: what a causal model remembers of the frames before the current chunk.

    M = sink + slow + fast (the paper's S, C_slow and L_fast)

sink   the video's first frames, for ever
slow   first frames of chunks that differed from the chunk before them (surprisal, eq. 7), the newest `slow` of them
fast   the newest frames; the chunk that is being made counts into it

A memory is a value: `remember` returns a new memory and nothing writes into the old one. That is what lets a rollout be
replayed, checkpointed and resumed; caches that are written in place give wrong gradients there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .key_values import Frames, KeyValues, mean_key, split_newest

ShareKey = Callable[[Tensor], Tensor]  # this process's mean key -> the mean key that every process decides by


@dataclass(frozen=True)
class MemorySpec:
    """How many latent frames each part holds, which frames enter the slow part, and where RoPE places them."""

    sink: int
    slow: int
    fast: int  # counts the current chunk
    promote: Literal["similarity", "uniform", "random", "none"]
    tau: float  # eq. 7: a chunk less similar than this to the chunk before is news
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
    """The memory M of sec. 3.3, with one decision for all layers.

    Sink, slow and fast are disjoint and each in the order of time, unless `when` is enqueue or `fill` is early_raw.
    """

    spec: MemorySpec
    sink: Frames = ()
    promoted_frames: Frames = ()  # of the slow part, the newest `spec.slow`
    early: Frames = ()  # fill: early_raw; the first `spec.slow` frames after the sink
    fast: Frames = ()
    pending: tuple[int, ...] = ()  # indices of frames in the fast part that enter the slow part when they leave it
    last_mean_key: Tensor | None = None  # [layers, N * D], of the pass that the next pass is compared with
    frame_count: int = 0  # latent frames since the video began
    similarity: tuple[float, ...] | None = None  # of the newest chunk to the chunk before, in each layer, for the log
    noisy_passes: int = 0  # over the chunk that is being made (timing: first_call)
    is_promoted: bool = False  # one of those passes has promoted the chunk
    is_newest_news: bool | None = None  # decision on the newest chunk; None: not tested. For the log
    promoted_count: int = 0  # frames promoted since the video began
    share_key: ShareKey | None = None  # training's, where several processes or groups share a batch; None: decide by the own keys

    @property
    def slow(self) -> Frames:
        """Promoted frames; with early_raw they overwrite the early frames from the left."""
        return self.promoted_frames + self.early[len(self.promoted_frames) :]

    @property
    def frames(self) -> Frames:
        """Every remembered frame, in the order of RoPE positions (eq. 8): sink, slow, fast."""
        return self.sink + self.slow + self.fast

    def frame_indices(self) -> dict[str, list[int]]:
        """Return the latent frame numbers in each part, for people."""
        return {name: [frame.index for frame in getattr(self, name)] for name in ("sink", "slow", "fast")}

    @property
    def decisions(self) -> tuple[bool, ...]:
        """Whether the newest chunk is news: one value for all layers, or () when it was not tested."""
        return () if self.is_newest_news is None else (self.is_newest_news,)

    def past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys and the values that a layer attends to, in the order of `key_positions`."""
        return [frame.keys[layer] for frame in self.frames], [frame.values[layer] for frame in self.frames]

    def remember(self, chunk: Frames) -> ContextMemory:
        """Return the memory after one more clean chunk.

        `# Paper:` eq. 7: a chunk whose keys resemble those of the chunk before adds nothing and is forgotten when it
        leaves the fast part; of any other its first frame moves on to the slow part, whose oldest frame makes room.
        """
        spec, length = self.spec, len(chunk)
        # eq. 7: is this chunk news? `candidates` are its frames that may enter the slow part.
        tested, candidates = self._test_news(chunk)
        is_news = self.is_promoted or bool(candidates) if spec.is_tested(self.frame_count // length) else None
        if self.is_promoted:
            candidates = ()
        if spec.when == "enqueue":
            tested, candidates = tested._promote(candidates), ()
        # The sink fills first and never changes afterwards.
        free = max(spec.sink - len(self.sink), 0)
        sink, rest = self.sink + chunk[:free], chunk[free:]
        # By frame index, not by free places: after a flush those places must stay empty, since the first frames are gone.
        early_count = sum(frame.index < spec.sink + spec.slow for frame in rest) if spec.fill == "early_raw" else 0
        early, rest = self.early + rest[:early_count], rest[early_count:]
        # The next chunk counts into the fast part, so what is left for the past is smaller by its length.
        leaving, fast = split_newest(self.fast + rest, max(spec.fast - length, 0))
        # Choice: promoted when it leaves the fast part, not when it is tested, so that no frame is there twice.
        pending = {*self.pending, *(frame.index for frame in candidates)}
        after = tested._promote(tuple(frame for frame in leaving if frame.index in pending))
        still_pending = tuple(frame.index for frame in fast if frame.index in pending)
        after = replace(after, sink=sink, early=early, fast=fast, pending=still_pending, is_newest_news=is_news)
        # ready for the next chunk, of which no pass was offered yet
        return replace(after, frame_count=self.frame_count + length, noisy_passes=0, is_promoted=False)

    def offer(self, chunk: Frames) -> ContextMemory:
        """Return the memory after one pass over a chunk that is still noisy; only timing first_call looks at its keys.

        The chunk's first pass is compared with the clean pass of the chunk before, a later pass (the clean pass, too) with
        the pass before it, until two differ; the keys and values of that pass are promoted (docs/method.md, "Promotion").
        """
        if self.spec.timing != "first_call" or self.is_promoted:
            return self
        tested, candidates = self._test_news(chunk)
        return replace(tested._promote(candidates), noisy_passes=self.noisy_passes + 1, is_promoted=bool(candidates))

    def _test_news(self, chunk: Frames) -> tuple[ContextMemory, Frames]:
        """Compare a pass with the pass before; return the memory that knows it, and the frames to promote, () if it is no news."""
        mean = mean_key(chunk)  # [layers, N * D]
        if self.share_key is not None:
            mean = self.share_key(mean)
        similarity = None  # sim(k_t, k_(t-1)) of eq. 7, one cosine a layer
        if self.last_mean_key is not None:
            similarity = tuple(F.cosine_similarity(mean, self.last_mean_key, dim=-1).tolist())
        # The log wants a chunk's first pass against the chunk before; later passes are compared with the chunk's own.
        tested = replace(self, last_mean_key=mean, similarity=self.similarity if self.noisy_passes else similarity)
        # frames that fill the sink are remembered anyway
        beyond_sink = chunk[max(self.spec.sink - len(self.sink), 0) :]
        if not self._is_news(self.frame_count // len(chunk), similarity):
            return tested, ()
        return tested, beyond_sink if self.spec.keep == "all" else beyond_sink[:1]

    def _is_news(self, chunk: int, similarity: tuple[float, ...] | None) -> bool:
        """Decide by eq. 7 (similarity below tau), or by one of the rules that experiments put in its place."""
        # Choice: "at 2-chunk intervals" tests every second chunk against its immediate predecessor; it gives the one
        # latent in 24 frames of the teacher's data and the 20 seconds that the paper claims.
        spec = self.spec
        if not spec.is_tested(chunk):
            return False
        if spec.promote == "similarity":
            return similarity is not None and sum(similarity) / len(similarity) < spec.tau
        if spec.promote == "random":
            return random.Random(f"chunk {chunk}").random() < 0.5  # from the chunk's number alone, so a memory stays a value
        return spec.promote == "uniform"

    def _promote(self, frames: Frames) -> ContextMemory:
        """Return the memory with these frames in the slow part, which drops its oldest frames."""
        if not self.spec.slow:
            return self
        # A copy, because a frame's tensors are slices of its chunk's, which would stay in memory with all their frames.
        copies = (KeyValues(f.index, tuple(k.clone() for k in f.keys), tuple(v.clone() for v in f.values)) for f in frames)
        promoted_frames = (*self.promoted_frames, *copies)[-self.spec.slow :]
        return replace(self, promoted_frames=promoted_frames, promoted_count=self.promoted_count + len(frames))

    def commit_context(self, frames: int) -> ContextMemory:
        """Return what the clean pass over the newest `frames` frames may look at (setting `commit`)."""
        if self.spec.commit == "all":
            return self
        # by frame index, wherever a frame is stored: the newest frames that fit beside the chunk
        first = self.frame_count - max(self.spec.fast - frames, 0)
        recent = tuple(frame for frame in self.sink + self.early + self.fast if frame.index >= first)
        return replace(self, sink=(), promoted_frames=(), early=(), fast=recent)

    def flushed(self, recent: int) -> ContextMemory:
        """Return only the sink and the newest `recent` frames: the KV flush of Infinity-RoPE at a change of prompt."""
        # the early frames count among the newest while the video is short
        fast = split_newest(self.early + self.fast, recent)[1]
        pending = tuple(frame.index for frame in fast if frame.index in self.pending)
        return replace(self, promoted_frames=(), early=(), fast=fast, pending=pending)

    def restarted(self, first: int, keep_sink: bool) -> ContextMemory:
        """Return a memory of the sink or of nothing, to be filled again from latent frame `first` on: LongLive's KV recache."""
        sink = self.sink if keep_sink else ()
        return ContextMemory(self.spec, sink=sink, frame_count=first, promoted_count=self.promoted_count, share_key=self.share_key)

    def query_positions(self, frames: int, layer: int = 0) -> list[int]:
        """Return the temporal RoPE indices of the next `frames` frames: the end of eq. 8's window unless `positions` says otherwise.

        fixed is eq. 8 from the first chunk on, packed counts the remembered frames, absolute is the frame's own number.
        """
        spec = self.spec
        if spec.positions == "absolute":
            first = self.frame_count
        elif spec.positions == "packed":
            first = len(self.frames)
        elif spec.positions == "anchored":
            # Choice: until the memory has filled, frames sit where they would without bounds, as the models were
            # trained; from then on the window's end is where eq. 8 has it.
            first = min(self.frame_count, spec.size - frames)
        else:
            first = spec.size - frames
        return list(range(first, first + frames))

    def key_positions(self, frames: int, layer: int = 0) -> list[int]:
        """Return the temporal RoPE index of every remembered frame, in the order of `frames`, for the next `frames` frames."""
        if self.spec.positions == "absolute":
            return [frame.index for frame in self.frames]
        if self.spec.positions == "packed":
            return list(range(len(self.frames)))
        # eq. 8: the sink from 0 on, the slow part after the sink's places, the fast part just before the current chunk.
        query = self.query_positions(frames)[0]
        return [
            *range(len(self.sink)),
            *range(self.spec.sink, self.spec.sink + len(self.slow)),
            *range(query - len(self.fast), query),
        ]


@dataclass(frozen=True, eq=False)
class LayerMemories:
    """Memories of a model whose layers decide for themselves (scope layer): a ContextMemory of a single layer for each.

    Its methods are those of ContextMemory, done in every layer; `past` and positions are those of the layer that asks.
    """

    spec: MemorySpec
    layers: tuple[ContextMemory, ...] = ()  # none before the first chunk tells how many there are
    share_key: ShareKey | None = None  # as in ContextMemory

    def _apply_to_layers(self, step: Callable[[ContextMemory, Frames], ContextMemory], chunk: Frames) -> LayerMemories:
        """Return the memories after `step` was done in every layer with that layer's share of a chunk."""
        before = self.layers or (ContextMemory(self.spec, share_key=self.share_key),) * len(chunk[0].keys)
        # a layer's memory sees frames of one layer
        parts = [tuple(KeyValues(f.index, (f.keys[n],), (f.values[n],)) for f in chunk) for n in range(len(before))]
        return replace(self, layers=tuple(step(memory, part) for memory, part in zip(before, parts, strict=True)))

    def _map_layers(self, step: Callable[[ContextMemory], ContextMemory]) -> LayerMemories:
        return replace(self, layers=tuple(step(memory) for memory in self.layers))

    def remember(self, chunk: Frames) -> LayerMemories:
        return self._apply_to_layers(ContextMemory.remember, chunk)

    def offer(self, chunk: Frames) -> LayerMemories:
        return self._apply_to_layers(ContextMemory.offer, chunk)

    def commit_context(self, frames: int) -> LayerMemories:
        return self._map_layers(lambda memory: memory.commit_context(frames))

    def flushed(self, recent: int) -> LayerMemories:
        return self._map_layers(lambda memory: memory.flushed(recent))

    def restarted(self, first: int, keep_sink: bool) -> LayerMemories:
        return self._map_layers(lambda memory: memory.restarted(first, keep_sink))

    def past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        return self.layer_memory(layer).past(0)

    def query_positions(self, frames: int, layer: int = 0) -> list[int]:
        return self.layer_memory(layer).query_positions(frames)

    def key_positions(self, frames: int, layer: int = 0) -> list[int]:
        return self.layer_memory(layer).key_positions(frames)

    def layer_memory(self, layer: int) -> ContextMemory:
        """Return a layer's memory, which is empty before the first chunk."""
        return self.layers[layer] if self.layers else ContextMemory(self.spec)

    def frame_indices(self) -> dict[str, list[int]]:
        """Return the latent frame numbers in each part of the first layer, for people."""
        return self.layer_memory(0).frame_indices()

    @property
    def frame_count(self) -> int:
        """Latent frames since the video began."""
        return self.layer_memory(0).frame_count

    @property
    def promoted_count(self) -> int:
        """Frames promoted since the video began, summed over layers."""
        return sum(memory.promoted_count for memory in self.layers)

    @property
    def similarity(self) -> tuple[float, ...] | None:
        """The newest chunk's similarity to the chunk before, in each layer; None before the second chunk."""
        values = [value for memory in self.layers for value in memory.similarity or ()]
        return tuple(values) or None

    @property
    def decisions(self) -> tuple[bool, ...]:
        """Whether the newest chunk is news, in each layer; () when it was not tested."""
        return tuple(decision for memory in self.layers for decision in memory.decisions)


Memory = ContextMemory | LayerMemories


@dataclass(frozen=True)
class ChunkComparison:
    """A chunk beside the chunk before it, as eq. 7 compares them."""

    similarity: tuple[float, ...]  # of their mean keys, in each layer
    decisions: tuple[bool, ...]  # as the memory's


def compare_newest_chunk(memory: Memory) -> tuple[ChunkComparison, ...]:
    """Return the comparison of the newest chunk; () for a video's first chunk, which has none before it."""
    return () if memory.similarity is None else (ChunkComparison(memory.similarity, memory.decisions),)


def empty_memory(spec: MemorySpec, share_key: ShareKey | None = None) -> Memory:
    """Return the memory before a video's first chunk. `share_key`: see `ContextMemory.share_key`."""
    return LayerMemories(spec, share_key=share_key) if spec.scope == "layer" else ContextMemory(spec, share_key=share_key)


def build_plain_spec(sink: int, fast: int, positions: Literal["packed", "absolute"]) -> MemorySpec:
    """Return a memory of the first `sink` and the newest `fast` frames that never promotes."""
    return MemorySpec(
        sink=sink,
        slow=0,
        fast=fast,
        promote="none",
        tau=1.0,
        interval=1,
        begin=1,
        keep="first",
        when="evict",
        timing="clean",
        fill="none",
        scope="global",
        positions=positions,
        commit="all",
    )


def fixed_memory(frames: Frames) -> ContextMemory:
    """Return a memory of exactly these frames, at positions 0, 1, 2, …, that never promotes: a context read in one pass."""
    return ContextMemory(build_plain_spec(0, len(frames), "packed"), fast=frames, frame_count=len(frames))
