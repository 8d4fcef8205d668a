# Long: the policy of sec. 3.3 is read as a whole.
"""What a causal model remembers of the frames before the current chunk (sec. 3.3).

A memory is a value: `remember` returns a new one and nothing writes into the old. That is what lets a rollout be
replayed, checkpointed and resumed; in-place caches give wrong gradients there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MemorySpec:
    """How many latent frames each part holds, which frames the slow part keeps, and where RoPE places them."""

    sink: int
    slow: int
    fast: int  # counts the current chunk
    promote: Literal["similarity", "uniform", "random", "none"]
    tau: float  # a chunk less similar than this to the one before it is news (eq. 7)
    interval: int  # every how many chunks one is tested (similarity, random) or kept (uniform)
    begin: int  # the first chunk that may be kept; chunk 0 is the sink
    keep: Literal["first", "all"]  # frames of a chunk that is kept
    when: Literal["evict", "enqueue"]  # kept as it leaves the fast part, or as soon as it was tested: then it is there twice
    timing: Literal["clean", "first_call"]  # tested by its clean keys, or by those of each noisy pass until one says yes
    fill: Literal["none", "early_raw"]  # free places of the slow part: left out, or the video's first frames after the sink
    scope: Literal["global", "layer"]  # one decision for all layers, or one a layer
    positions: Literal["anchored", "fixed", "packed", "absolute"]
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
            stated = f"fill is {self.fill} and timing {self.timing}, but when is evict"
            raise ValueError(f"{stated}; use when: enqueue, or fill: none and timing: clean, since only kept clean frames can wait")

    def tests(self, chunk: int) -> bool:
        """Whether it is this chunk's turn to be kept or not, by its number."""
        return self.promote != "none" and chunk >= self.begin and chunk % self.interval == 0

    def hold(self, chunk: int) -> None:
        """Refuses chunks that the fast part, which counts the current one, has no room for."""
        if self.fast < chunk:
            raise ValueError(f"memory.fast is {self.fast}, but it counts the current chunk of {chunk} latent frames; use at least that")

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
    """Sink, slow and fast are disjoint, and each in the order of time, but for the settings that say otherwise."""

    spec: MemorySpec
    sink: Frames = ()
    kept: Frames = ()  # promoted frames, the newest `spec.slow`
    early: Frames = ()  # fill: early_raw; the first `spec.slow` frames after the sink
    fast: Frames = ()
    news: tuple[int, ...] = ()  # indices of frames in fast that go on to the slow part when they leave
    last: Tensor | None = None  # mean key of the pass that the next one is compared with
    seen: int = 0  # frames since the video began
    similarity: tuple[float, ...] | None = None  # of the newest chunk to the one before, in each layer, for the log
    calls: int = 0  # noisy passes over the chunk being made (timing: first_call)
    judged: bool = False  # one of them has kept it
    chosen: bool | None = None  # the newest chunk is worth keeping; None: it was not tested. For the log
    promoted: int = 0  # frames so far

    @property
    def slow(self) -> Frames:
        """Promoted frames; with early_raw they overwrite the early ones from the left."""
        return self.kept + self.early[len(self.kept) :]

    @property
    def frames(self) -> Frames:
        return self.sink + self.slow + self.fast

    def held(self) -> dict[str, list[int]]:
        """Latent frames in each part, for people."""
        return {name: [frame.index for frame in getattr(self, name)] for name in ("sink", "slow", "fast")}

    @property
    def decisions(self) -> tuple[bool, ...]:
        """On the newest chunk: one for all layers, or () when it was not tested."""
        return () if self.chosen is None else (self.chosen,)

    def past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values that a layer attends to, in the order of `key_positions`."""
        return [frame.keys[layer] for frame in self.frames], [frame.values[layer] for frame in self.frames]

    def remember(self, chunk: Frames) -> ContextMemory:
        """The memory after one more clean chunk.

        `# Paper:` eq. 7: a chunk whose keys resemble those of the chunk before adds nothing and is forgotten when it
        leaves the fast part; of any other its first frame moves on to the slow part, whose oldest frame makes room.
        """
        spec, length = self.spec, len(chunk)
        tested, keep = self._test(chunk)
        chosen = self.judged or bool(keep) if spec.tests(self.seen // length) else None
        if self.judged:
            keep = ()
        if spec.when == "enqueue":
            tested, keep = tested._promote(keep), ()
        room = max(spec.sink - len(self.sink), 0)
        sink, rest = self.sink + chunk[:room], chunk[room:]
        # by number, not by room: after a flush the places stay free, the video's first frames are gone
        raw = sum(frame.index < spec.sink + spec.slow for frame in rest) if spec.fill == "early_raw" else 0
        early, rest = self.early + rest[:raw], rest[raw:]
        # the next chunk counts into the fast part, so what is left for the past is smaller by its length
        leaving, fast = split(self.fast + rest, max(spec.fast - length, 0))
        # Choice: promoted when it leaves the fast part, not when it is tested, so that no frame is there twice.
        news = {*self.news, *(frame.index for frame in keep)}
        after = tested._promote(tuple(frame for frame in leaving if frame.index in news))
        staying = tuple(frame.index for frame in fast if frame.index in news)
        after = replace(after, sink=sink, early=early, fast=fast, news=staying, chosen=chosen)
        return replace(after, seen=self.seen + length, calls=0, judged=False)

    def offer(self, chunk: Frames) -> ContextMemory:
        """The memory after one pass over a chunk that is still noisy; only timing first_call looks at its keys.

        The chunk's first pass is compared with the clean pass of the chunk before, a later one (the clean one, too) with the
        pass before it, until one differs; the keys and values of that pass are kept (docs/method.md 6.2, i to iii).
        """
        if self.spec.timing != "first_call" or self.judged:
            return self
        tested, keep = self._test(chunk)
        return replace(tested._promote(keep), calls=self.calls + 1, judged=bool(keep))

    def _test(self, chunk: Frames) -> tuple[ContextMemory, Frames]:
        """The comparison with the pass before, and the frames of the chunk that are worth keeping."""
        mean = mean_key(chunk)
        similarity = None if self.last is None else tuple(F.cosine_similarity(mean, self.last, dim=-1).tolist())
        # for the log: a chunk's first pass against the chunk before; later passes are compared with the chunk's own
        tested = replace(self, last=mean, similarity=self.similarity if self.calls else similarity)
        rest = chunk[max(self.spec.sink - len(self.sink), 0) :]
        if not self._is_news(self.seen // len(chunk), similarity):
            return tested, ()
        return tested, rest if self.spec.keep == "all" else rest[:1]

    def _is_news(self, chunk: int, similarity: tuple[float, ...] | None) -> bool:
        # Choice: "at 2-chunk intervals" tests every second chunk against its immediate predecessor; it gives the one
        # latent in 24 frames of the teacher's data and the 20 seconds that the paper claims.
        spec = self.spec
        if not spec.tests(chunk):
            return False
        if spec.promote == "similarity":
            return similarity is not None and sum(similarity) / len(similarity) < spec.tau
        if spec.promote == "random":
            return random.Random(f"chunk {chunk}").random() < 0.5  # from the chunk's number alone, so a memory stays a value
        return spec.promote == "uniform"

    def _promote(self, frames: Frames) -> ContextMemory:
        if not self.spec.slow:
            return self
        # a copy: a frame's tensors are slices of its chunk's, which would stay in memory as a whole
        own = (Frame(f.index, tuple(k.clone() for k in f.keys), tuple(v.clone() for v in f.values)) for f in frames)
        kept = (*self.kept, *own)[-self.spec.slow :]
        return replace(self, kept=kept, promoted=self.promoted + len(frames))

    def committing(self, frames: int) -> ContextMemory:
        """What the clean pass over the newest frames sees (`commit`)."""
        if self.spec.commit == "all":
            return self
        first = self.seen - max(self.spec.fast - frames, 0)
        recent = tuple(frame for frame in self.sink + self.early + self.fast if frame.index >= first)
        return replace(self, sink=(), kept=(), early=(), fast=recent)

    def flushed(self, recent: int) -> ContextMemory:
        """Only the sink and the newest frames: Infinity-RoPE's KV flush."""
        fast = split(self.early + self.fast, recent)[1]
        news = tuple(frame.index for frame in fast if frame.index in self.news)
        return replace(self, kept=(), early=(), fast=fast, news=news)

    def restarted(self, first: int, keep_sink: bool) -> ContextMemory:
        """Nothing but perhaps the sink, ready to be filled again from latent frame `first` on: LongLive's KV recache."""
        return ContextMemory(self.spec, sink=self.sink if keep_sink else (), seen=first, promoted=self.promoted)

    def query_positions(self, frames: int, layer: int = 0) -> list[int]:
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

    def key_positions(self, frames: int, layer: int = 0) -> list[int]:
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


@dataclass(frozen=True, eq=False)
class LayerMemories:
    """Scope layer: every layer decides for itself, so their slow parts differ. Each is a memory of frames with one layer."""

    spec: MemorySpec
    layers: tuple[ContextMemory, ...] = ()  # none before the first chunk tells how many there are

    def _each(self, step: Callable[[ContextMemory, Frames], ContextMemory], chunk: Frames) -> LayerMemories:
        before = self.layers or (ContextMemory(self.spec),) * len(chunk[0].keys)
        parts = [tuple(Frame(f.index, (f.keys[n],), (f.values[n],)) for f in chunk) for n in range(len(before))]
        return LayerMemories(self.spec, tuple(step(memory, part) for memory, part in zip(before, parts, strict=True)))

    def _all(self, step: Callable[[ContextMemory], ContextMemory]) -> LayerMemories:
        return LayerMemories(self.spec, tuple(step(memory) for memory in self.layers))

    def remember(self, chunk: Frames) -> LayerMemories:
        return self._each(ContextMemory.remember, chunk)

    def offer(self, chunk: Frames) -> LayerMemories:
        return self._each(ContextMemory.offer, chunk)

    def committing(self, frames: int) -> LayerMemories:
        return self._all(lambda memory: memory.committing(frames))

    def flushed(self, recent: int) -> LayerMemories:
        return self._all(lambda memory: memory.flushed(recent))

    def restarted(self, first: int, keep_sink: bool) -> LayerMemories:
        return self._all(lambda memory: memory.restarted(first, keep_sink))

    def past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        return self.at(layer).past(0)

    def query_positions(self, frames: int, layer: int = 0) -> list[int]:
        return self.at(layer).query_positions(frames)

    def key_positions(self, frames: int, layer: int = 0) -> list[int]:
        return self.at(layer).key_positions(frames)

    def at(self, layer: int) -> ContextMemory:
        return self.layers[layer] if self.layers else ContextMemory(self.spec)

    def held(self) -> dict[str, list[int]]:
        """Latent frames in each part of the first layer, for people."""
        return self.at(0).held()

    @property
    def seen(self) -> int:
        return self.at(0).seen

    @property
    def promoted(self) -> int:
        """Frames so far, of all layers together."""
        return sum(memory.promoted for memory in self.layers)

    @property
    def similarity(self) -> tuple[float, ...] | None:
        found = [value for memory in self.layers for value in memory.similarity or ()]
        return tuple(found) or None

    @property
    def decisions(self) -> tuple[bool, ...]:
        """On the newest chunk, one a layer; () when it was not tested."""
        return tuple(one for memory in self.layers for one in memory.decisions)


Memory = ContextMemory | LayerMemories


@dataclass(frozen=True)
class Compared:
    """A chunk beside the one before it, as eq. 7 sees them."""

    similarity: tuple[float, ...]  # of their keys, in each layer
    kept: tuple[bool, ...]  # `decisions` of the memory


def compared(memory: Memory) -> tuple[Compared, ...]:
    """Of the newest chunk; () for a video's first."""
    return () if memory.similarity is None else (Compared(memory.similarity, memory.decisions),)


def empty(spec: MemorySpec) -> Memory:
    return LayerMemories(spec) if spec.scope == "layer" else ContextMemory(spec)


def whole(frames: Frames) -> ContextMemory:
    """A memory that is these frames, at positions 0, 1, 2, …, and decides nothing."""
    spec = MemorySpec(
        sink=0,
        slow=0,
        fast=len(frames),
        promote="none",
        tau=1.0,
        interval=1,
        begin=1,
        keep="first",
        when="evict",
        timing="clean",
        fill="none",
        scope="global",
        positions="packed",
        commit="all",
    )
    return ContextMemory(spec, fast=frames, seen=len(frames))


def dump(memory: Memory) -> dict[str, Any]:
    """A memory as nested dictionaries and tensors, for a checkpoint."""
    if isinstance(memory, LayerMemories):
        return {"layers": [dump(layer) for layer in memory.layers]}
    return {f.name: getattr(memory, f.name) for f in fields(memory) if f.name not in ("spec", *PARTS)} | {
        part: [{"index": f.index, "keys": f.keys, "values": f.values} for f in getattr(memory, part)] for part in PARTS
    }


def restore(spec: MemorySpec, state: Mapping[str, Any]) -> Memory:
    if "layers" in state:
        return LayerMemories(spec, tuple(restore(spec, layer) for layer in state["layers"]))  # type: ignore[misc]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in state.items()}
    for part in PARTS:
        values[part] = tuple(Frame(f["index"], tuple(f["keys"]), tuple(f["values"])) for f in state[part])
    return ContextMemory(spec, **values)  # type: ignore[arg-type]


PARTS = ("sink", "kept", "early", "fast")


def split(frames: Frames, keep: int) -> tuple[Frames, Frames]:
    """All but the last `keep` frames, and those."""
    at = max(len(frames) - keep, 0)
    return frames[:at], frames[at:]


class Tape:
    """Mean keys of a batch's first video, in the order they were asked for: a batch that is computed in several groups, one
    after the other, decides by those of the first (cf_model/train/trainer/ranks.py)."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.whole, self.read = False, 0  # the first group is through; read so far by the current one


_tape: Tape | None = None


@contextmanager
def decided(tape: Tape | None) -> Iterator[None]:
    """While it lasts memories decide by the tape: the first time it is recorded, later on followed."""
    global _tape
    before, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = before
    if tape:
        tape.whole, tape.read = True, 0


def mean_key(chunk: Frames) -> Tensor:
    """Keys of the batch's first video, averaged over the chunk's tokens, in each layer: [layers, N * D].

    Choice: one decision for the whole batch (its first video's) and, with scope global, for all layers (the mean of their
    cosines). Layers that decide on their own remember different frames, and the teacher can't be shown the same ones. An
    average over videos would be smoother than any one of them, and training would promote what inference does not.
    """
    if _tape and _tape.whole:
        _tape.read += 1
        return _tape.keys[_tape.read - 1]
    layers = range(len(chunk[0].keys))
    mean = torch.stack([torch.stack([f.keys[layer][0] for f in chunk]).float().mean(dim=(0, 1)).flatten() for layer in layers]).detach()
    if dist.is_initialized():  # several ranks share the batch, whose first video is the first rank's (cf_model/train/trainer/ranks.py)
        dist.broadcast(mean, 0)
    if _tape:
        _tape.keys.append(mean)
    return mean
