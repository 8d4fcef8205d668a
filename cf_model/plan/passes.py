"""The passes of a training step: which frames each one looks at, and how often it is made. Read from the specs that training
reads, and from the memory's own policy; `need.py` adds them up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from cf_model.model.key_values import KeyValues
from cf_model.model.memory import ContextMemory, MemorySpec
from cf_model.model.rollout import HorizonSpec, RolloutSpec
from cf_model.model.view import TeacherView
from cf_model.train.student import StudentSpec

from .cost import Costs

Shares = Mapping[int, float]  # value -> how often


class Tally:
    def __init__(self, shares: dict[int, float]) -> None:
        self.shares = shares

    def add(self, value: int, share: float) -> None:
        self.shares[value] = self.shares.get(value, 0.0) + share


@dataclass(frozen=True)
class Scored:
    """A bidirectional look at a target after its context: one pass over both, or after one that has read the context."""

    costs: Costs
    target: tuple[int, int, int]  # frames, remembered frames and noise levels of the pass
    context: int  # frames that a pass of their own reads, which is made once for any number of noise levels

    @property
    def look(self) -> float:
        """Operations of the pass over the target."""
        return self.costs.forward(*self.target).total

    @property
    def read(self) -> float:
        return self.costs.forward(self.context).total if self.context else 0.0

    @property
    def trained(self) -> float:
        both = [self.target, *([(self.context, 0, 1)] if self.context else [])]
        return sum(self.costs.forward(*one).trained(self.costs.compute.checkpointing) for one in both)

    @property
    def remembered(self) -> int:
        """Bytes of the context's keys and values."""
        return self.context * self.costs.memory_frame()

    @property
    def kept(self) -> int:
        """Bytes that reading the context keeps for the backward pass, beside what it is read for."""
        if not self.context:
            return 0
        # of a pass that only remembers, the last block's keys and values are all that the graph reaches
        last = 0 if self.costs.compute.checkpointing else self.costs.block(self.context) + self.costs.ends(self.context)
        return self.costs.kept(self.context) - last

    @property
    def activations(self) -> int:
        return self.kept + self.costs.activations(*self.target)


def scored(costs: Costs, view: TeacherView, target: int, context: int) -> Scored:
    if view.context_pass == "own":
        return Scored(costs, (target, context, 1), context)
    frames = context + target
    return Scored(costs, (frames, 0, frames * costs.tokens if context and view.context_sigma == "zero" else 1), 0)


# ---------------------------------------------------------------------------------------------------- causal models


@dataclass(frozen=True)
class Seen:
    """Remembered frames that the passes over one chunk look at, and the frames that exist while it is made."""

    denoising: int
    committing: int
    alive: frozenset[KeyValues]


def remembered(spec: MemorySpec, chunk: int) -> Iterator[Seen]:
    """Chunk after chunk, by the memory's own policy on frames of no size."""
    promote = "uniform" if spec.promote in ("similarity", "random") else spec.promote
    memory = ContextMemory(replace(spec, promote=promote, scope="global"))
    nothing, first = (torch.zeros(1, 1, 1, 1),), 0
    while True:
        made = tuple(KeyValues(first + frame, nothing, nothing) for frame in range(chunk))
        memory = memory.offer(made)
        past = memory.frames
        yield Seen(len(past), len(memory.commit_context(chunk).frames), frozenset((*past, *made)))
        memory, first = memory.remember(made), first + chunk


def lengths(horizon: HorizonSpec, chunk: int, steps: int) -> Shares:
    """Latent frames of a rollout over a whole stage (alg. 1's curriculum)."""
    found = Tally({})
    for step in range(steps):
        if horizon.mode == "const":
            found.add(horizon.longest, 1 / steps)
            continue
        progress = min(1.0, step / horizon.decay) if horizon.decay else 1.0
        grown = horizon.shortest * (horizon.longest / horizon.shortest) ** progress
        longest = int(grown if horizon.mode == "exp" else horizon.shortest + progress * (horizon.longest - horizon.shortest))
        whole = range(horizon.shortest // chunk, longest // chunk + 1)
        for count in whole:
            found.add(count * chunk, 1 / steps / len(whole))
    return found.shares


def starts(frames: int, spec: RolloutSpec) -> Shares:
    """Where the scored window begins in a rollout."""
    last = (frames - spec.window) // spec.chunk
    if spec.place == "last" or not last:
        return {last * spec.chunk: 1.0}

    def below(u: float) -> float:
        return u if spec.place == "uniform" else 1 - (1 - u) ** 2

    return {n * spec.chunk: below((n + 1) / (last + 1)) - below(n / (last + 1)) for n in range(last + 1)}


@dataclass(frozen=True)
class Rolling:
    """Operations of the parts of a step that the student runs, for a window that begins at one frame."""

    rollout: float
    replay: float
    alive: int  # frames with keys and values while the window is replayed


def rolling(spec: StudentSpec, costs: Costs, seen: list[Seen], start: int) -> Rolling:
    roll, chunk, levels = spec.rollout, spec.rollout.chunk, len(spec.rollout.levels)
    early = levels if roll.exit == "last" else (levels + 1) / 2  # passes of a chunk that stops at a random level, the mean
    first, count = start // chunk, roll.window // chunk
    rollout, replay = 0.0, 0.0
    for number, one in enumerate(seen[: first + count]):
        into, each = number - first, costs.forward(chunk, one.denoising)
        clean = roll.full_denoise == "all" or (roll.full_denoise == "context" and number * chunk >= start - spec.memory.size)
        passes = (levels if clean else early) if into < 0 else (levels if into < roll.full_first else early)
        again = into >= 0 and roll.renoise == "own"
        rollout += (passes + again) * each.total + costs.forward(chunk, one.committing).total
        if into >= roll.skip_first:
            replay += each.trained(costs.compute.checkpointing)
    # `persist: stream` makes only what is new: the step's share of a long video, whose window overlaps the one before
    if roll.persist == "stream" and first:
        new = count - roll.skip_first
        rollout = sum(
            (levels if number < first + roll.full_first else early) * costs.forward(chunk, seen[number].denoising).total
            + costs.forward(chunk, seen[number].committing).total
            for number in range(first + count - new, first + count)
        )
    return Rolling(rollout, replay, len(frozenset[KeyValues]().union(*(one.alive for one in seen[first : first + count]))))
