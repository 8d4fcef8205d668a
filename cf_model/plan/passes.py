"""Count the passes of a training step: which frames each pass attends to, and how often it is made.

Computed from the settings that training reads and by the memory's own policy; need.py adds the passes up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from cf_model.model.key_values import KeyValues
from cf_model.model.memory import MemorySpec, empty_memory
from cf_model.model.rollout import HorizonSpec, RolloutSpec
from cf_model.model.view import TeacherView
from cf_model.train.student import StudentSpec

from .cost import ModelCosts

Shares = Mapping[int, float]  # value -> share of the steps


class Tally:
    """Shares of the values of a random variable."""

    def __init__(self, shares: dict[int, float]) -> None:
        self.shares = shares

    def add(self, value: int, share: float) -> None:
        """Add to the share of a value."""
        self.shares[value] = self.shares.get(value, 0.0) + share


@dataclass(frozen=True)
class ScoringPass:
    """Passes of a score model over a target after its context: one pass over both, or one over the context and one over the target."""

    costs: ModelCosts
    target: tuple[int, int, int]  # frames, remembered frames and noise levels of the pass
    context: int  # frames read by a pass of their own, made once for any number of noise levels; 0: they are in the target's pass

    @property
    def target_operations(self) -> float:
        """Operations of the pass over the target."""
        return self.costs.forward(*self.target).repeated

    @property
    def context_operations(self) -> float:
        """Operations of the pass over the context."""
        return self.costs.forward(self.context).remembered if self.context else 0.0

    @property
    def trained_operations(self) -> float:
        """Operations of both passes with their backward passes."""
        checkpointing = self.costs.compute.checkpointing
        context = self.costs.forward(self.context).trained(checkpointing, ends_early=True) if self.context else 0.0
        return self.costs.forward(*self.target).trained(checkpointing) + context

    @property
    def context_bytes(self) -> int:
        """Bytes of the context's keys and values."""
        return self.context * self.costs.frame_bytes()

    @property
    def store_bytes(self) -> int:
        """Bytes in which passes without gradient find the context, its keys rotated, and leave the target's own."""
        return (self.context + self.target[0]) * self.costs.frame_bytes() if self.context else 0

    @property
    def saved_bytes(self) -> int:
        """Bytes that reading the context saves for the backward pass, beside its keys and values."""
        if not self.context:
            return 0
        # The graph of a pass that only remembers ends at the last block's keys and values.
        last = 0 if self.costs.compute.checkpointing else self.costs.block_bytes(self.context) + self.costs.end_bytes(self.context)
        return self.costs.saved_bytes(self.context) - last

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations at the peak."""
        return self.saved_bytes + self.costs.activation_bytes(*self.target)


def plan_scoring(costs: ModelCosts, view: TeacherView, target: int, context: int) -> ScoringPass:
    """Return the passes over `target` latent frames after `context` frames, as the view reads them."""
    if view.context_pass == "own":
        return ScoringPass(costs, (target, context, 1), context)
    frames = context + target
    return ScoringPass(costs, (frames, 0, frames * costs.tokens if context and view.context_sigma == "zero" else 1), 0)


@dataclass(frozen=True)
class ChunkPasses:
    """Numbers of remembered frames that the passes over one chunk attend to, and all frames in memory meanwhile."""

    denoising: int
    committing: int  # by the clean pass over the finished chunk
    alive: frozenset[KeyValues]


def trace_memory(spec: MemorySpec, chunk: int) -> Iterator[ChunkPasses]:
    """Yield the passes of chunk after chunk, by the memory's own policy on frames of size 1. Every tested chunk counts as news.

    Where videos decide for themselves, what is alive counts the slow part's spare candidates too (cf_model/model/slow_part.py).
    """
    promote = "uniform" if spec.promote == "random" else spec.promote
    # The frames of size 1 are zeros, whose cosine is 0: below a tau of 1, so news.
    memory = empty_memory(replace(spec, promote=promote, tau=1.0, scope="global"))
    nothing, first = (torch.zeros(1, 1, 1, 1),), 0
    while True:
        chunk_frames = tuple(KeyValues(first + frame, nothing, nothing) for frame in range(chunk))
        memory = memory.offer(chunk_frames)
        past = memory.frames
        added = (frame for frame, _ in memory.slow.added)
        yield ChunkPasses(memory.places, memory.commit_context(chunk).places, frozenset((*past, *added, *chunk_frames)))
        memory, first = memory.remember(chunk_frames), first + chunk


def tally_lengths(horizon: HorizonSpec, chunk: int, steps: int) -> Shares:
    """Tally the rollout lengths of a whole stage in latent frames (alg. 1, line 6)."""
    tally = Tally({})
    for step in range(steps):
        if horizon.mode == "const":
            tally.add(horizon.longest, 1 / steps)
            continue
        progress = min(1.0, step / horizon.decay) if horizon.decay else 1.0
        grown = horizon.shortest * (horizon.longest / horizon.shortest) ** progress
        longest = int(grown if horizon.mode == "exp" else horizon.shortest + progress * (horizon.longest - horizon.shortest))
        counts = range(horizon.shortest // chunk, longest // chunk + 1)
        for count in counts:
            tally.add(count * chunk, 1 / steps / len(counts))
    return tally.shares


def tally_starts(frames: int, spec: RolloutSpec) -> Shares:
    """Tally the first frames of the scored window in rollouts of one length (`place_window`)."""
    last = (frames - spec.window) // spec.chunk
    if spec.place == "last" or not last:
        return {last * spec.chunk: 1.0}

    def below(u: float) -> float:
        """Return the chance that the window's place, as a share of the last place, is below u."""
        return u if spec.place == "uniform" else 1 - (1 - u) ** 2

    return {n * spec.chunk: below((n + 1) / (last + 1)) - below(n / (last + 1)) for n in range(last + 1)}


@dataclass(frozen=True)
class RolloutCosts:
    """Operations of the student's parts of a step, for a window that begins at a given frame."""

    rollout: float
    replay: float
    alive: int  # frames with keys and values while the window is replayed


def cost_rollout(spec: StudentSpec, costs: ModelCosts, traced: list[ChunkPasses], start: int) -> RolloutCosts:
    """Count the operations of one rollout and of its replay, for a window that begins at latent frame `start` (alg. 1, lines 8 to 28)."""
    roll, chunk, levels = spec.rollout, spec.rollout.chunk, len(spec.rollout.levels)
    early = levels if roll.exit == "last" else (levels + 1) / 2  # mean number of passes of a chunk that stops at a random level
    first, count = start // chunk, roll.window // chunk
    rollout, replay = 0.0, 0.0
    for number, passes in enumerate(traced[: first + count]):
        place, denoising = number - first, costs.forward(chunk, passes.denoising)  # place in the window, below 0 in the context
        clean = roll.full_denoise == "all" or (roll.full_denoise == "context" and number * chunk >= start - spec.memory.size)
        noisy_passes = (levels if clean else early) if place < 0 else (levels if place < roll.full_first else early)
        if place >= 0 and roll.renoise == "own":
            # Finished first, then from a level drawn among those down to the pass with gradient (`renoise_chunk`): the mean number.
            again = 1 + (noisy_passes - 1) / 2
            noisy_passes = levels + again
        rollout += noisy_passes * denoising.repeated + costs.forward(chunk, passes.committing).remembered
        if place >= roll.skip_first:
            replay += denoising.trained(costs.compute.checkpointing)
    # `persist: stream` makes only what is new: the step's share of a long video, whose window overlaps the one before
    if roll.persist == "stream" and first:
        new = count - roll.skip_first
        rollout = sum(
            (levels if number < first + roll.full_first else early) * costs.forward(chunk, traced[number].denoising).repeated
            + costs.forward(chunk, traced[number].committing).remembered
            for number in range(first + count - new, first + count)
        )
    window = traced[first : first + count]
    return RolloutCosts(rollout, replay, len(frozenset[KeyValues]().union(*(passes.alive for passes in window))))
