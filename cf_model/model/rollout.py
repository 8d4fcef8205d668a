"""Self-rollout: the student makes its own video chunk by chunk, in training as at inference (alg. 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import Flow, Noise, add_noise, check_levels_fall, draw_gaussian
from .memory import ChunkComparison, Memory, MemorySpec, ShareKey, compare_newest_chunk, empty_memory


class CausalStudent(Protocol):
    """What a rollout asks of a model (`Denoiser`)."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None = None) -> Tensor: ...

    def offer(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...

    def remember(self, x_0: Tensor, text: Tensor, memory: Memory, *, grad: bool = False) -> Memory: ...


@dataclass(frozen=True)
class RolloutSpec:
    """How a chunk is denoised, and which frames of a training rollout are scored."""

    chunk: int  # latent frames made together
    levels: tuple[float, ...]  # before the shift; Self-Forcing: 1, 0.75, 0.5, 0.25
    window: int  # latent frames that are scored
    place: Literal["last", "uniform", "beta"]  # of the window: the rollout's end, or anywhere in it (Self-Forcing++; Beta(1, 2))
    renoise: Literal["none", "own"]  # scored as it was made, or made again from its own x_0 and fresh noise (Self-Forcing++)
    exit: Literal["shared", "per_chunk", "last"]  # where the target's chunks stop: one random level, one a chunk, or the last
    full_denoise: Literal["none", "context", "all"]  # chunks before the window that take every level; context: a memory's worth of them
    full_first: int  # chunks of the window, from its start, that take every level
    skip_first: int  # chunks of the window, from its start, that carry no gradient
    persist: Literal["fresh", "stream"]  # every step a new video, or the next part of the one before (LongLive's long tuning)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.window % self.chunk:
            raise ValueError(f"window is {self.window}, not whole chunks of {self.chunk} latent frames")
        check_levels_fall(self.levels)
        if not 0 <= self.skip_first <= self.full_first < self.window // self.chunk:
            stated = f"skip_first is {self.skip_first}, full_first {self.full_first}, of {self.window // self.chunk} chunks in the window"
            raise ValueError(f"{stated}; use 0 <= skip_first <= full_first, and leave one chunk that exits early")
        if self.persist == "stream" and (self.place != "last" or not self.skip_first):
            stated = f"place is {self.place} and skip_first {self.skip_first}, but persist is stream"
            raise ValueError(f"{stated}: a stream's window is its end and overlaps the one before; use place: last and skip_first: 1")
        if self.renoise == "own" and self.exit != "last":
            raise ValueError(f"exit is {self.exit}, but renoise is own: the window is made again from a finished video; use exit: last")


@dataclass(frozen=True)
class HorizonSpec:
    """The rollout curriculum: latent frames of a rollout, uniform up to a maximum that grows (alg. 1, line 6)."""

    shortest: int
    longest: int
    decay: int  # steps until the maximum is reached; 0: at once
    mode: Literal["linear", "exp", "const"]  # how it grows; const: every rollout is `longest`

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.decay < 0:
            stated = f"shortest is {self.shortest}, longest {self.longest}, decay {self.decay}"
            raise ValueError(f"{stated}; use 1 <= shortest <= longest and 0 <= decay")

    def sample_length(self, step: int, chunk: int, rng: torch.Generator) -> int:
        if self.mode == "const":
            return self.longest
        # Choice: min(1, ·), or the length would grow without bound; both ends included; whole chunks.
        progress = min(1.0, step / self.decay) if self.decay else 1.0
        if self.mode == "exp":
            longest = self.shortest * (self.longest / self.shortest) ** progress
        else:
            longest = self.shortest + progress * (self.longest - self.shortest)
        return chunk * int(torch.randint(self.shortest // chunk, int(longest) // chunk + 1, (), generator=rng))


@dataclass(frozen=True, eq=False)
class TargetChunk:
    """One scored chunk of a rollout: its pass can be replayed, with gradient, from what is here."""

    first: int  # latent frame
    x_t: Float[Tensor, "B F C H W"]
    sigma: float
    memory: Memory
    grad: bool


@dataclass(frozen=True, eq=False)
class Rollout:
    video: Float[Tensor, "B F C H W"]  # what was made, and what came before
    window: slice
    targets: tuple[TargetChunk, ...]
    exits: tuple[int, ...]  # of the target's chunks
    memory: Memory
    comparisons: tuple[ChunkComparison, ...]  # each chunk that was made, with the chunk before


def stream(
    student: CausalStudent,
    text: Float[Tensor, "B T E"],
    shape: tuple[int, int, int],
    *,
    sigmas: list[float],
    chunk: int,
    memory: Memory,
    rng: Noise,
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Chunks without end, every one fully denoised. `memory` may already hold a real prefix."""
    while True:
        with torch.no_grad():
            x_0, _, memory = denoise_chunk(student, text, shape, sigmas, chunk, memory, rng)
            memory = student.remember(x_0, text, memory)
        yield x_0


def denoise_chunk(
    student: CausalStudent,
    text: Tensor,
    shape: tuple[int, int, int],
    sigmas: list[float],
    chunk: int,
    memory: Memory,
    rng: Noise,
) -> tuple[Tensor, tuple[Tensor, Memory], Memory]:
    """One chunk from noise down the given levels: its x_0, the x_t and memory that the last level saw, the memory after it."""
    x_t = draw_gaussian((len(text), chunk, *shape), rng)
    x_0, seen = x_t, memory
    for step, sigma in enumerate(sigmas):
        if step:
            x_t = add_noise(x_0, draw_gaussian(x_0.shape, rng), x_t.new_full((len(x_t),), sigma))
        seen, level = memory, x_t.new_full((len(x_t),), sigma)
        if memory.spec.timing == "first_call":
            x_0, memory = student.offer(x_t, level, text, memory)
        else:
            x_0 = student(x_t, level, text, memory)
    return x_0, (x_t, seen), memory


@torch.no_grad()
def rollout(
    student: CausalStudent,
    text: Float[Tensor, "B T E"],
    frames: int,
    shape: tuple[int, int, int],
    *,
    spec: RolloutSpec,
    memory: MemorySpec,
    flow: Flow,
    rng: torch.Generator,
    past: Rollout | None = None,
    share_key: ShareKey | None = None,
) -> Rollout:
    """A video of the student's own making, without a graph; its `targets` are replayed by the loss.

    Clean context policy (sec. 3.2): chunks before the window take every level. Inside it chunks stop at a random level
    (Self Forcing, alg. 1). A chunk is remembered as the student left it, by a pass at σ = 0. Nothing after the window is
    made. With `past` the video goes on where that one ended, and its last frames begin the window.
    """
    sigmas = flow.shift_levels(spec.levels)
    start = place_window(frames, spec, rng)
    window = slice(start, start + spec.window)
    shared = int(torch.randint(len(sigmas), (), generator=rng))
    state = past.memory if past else empty_memory(memory, share_key)
    video, targets, exits, found = [past.video] if past else [], [], [], list[ChunkComparison]()
    for first in range(past.video.shape[1] if past else 0, window.stop, spec.chunk):
        scored = first >= start
        into = (first - start) // spec.chunk  # the window
        # Choice: with full_denoise none the context exits early too, which is Self-Forcing's training.
        clean = spec.full_denoise == "all" or (spec.full_denoise == "context" and first >= start - memory.size)
        leave = len(sigmas) - 1
        if into >= spec.full_first or not (scored or clean):
            leave = {"shared": shared, "last": leave, "per_chunk": -1}[spec.exit]
            leave = int(torch.randint(len(sigmas), (), generator=rng)) if leave < 0 else leave
        before = state
        x_0, (x_t, seen), state = denoise_chunk(student, text, shape, sigmas[: leave + 1], spec.chunk, state, rng)
        state = student.remember(x_0, text, state)
        if scored:
            exits.append(leave)
            if spec.renoise == "own":
                x_0, x_t, leave = renoise_chunk(student, text, x_0, sigmas, before, rng)
                seen = before
            targets.append(TargetChunk(first, x_t, sigmas[leave], seen, into >= spec.skip_first))
        video.append(x_0)
        found += compare_newest_chunk(state)
    return Rollout(torch.cat(video, dim=1), window, tuple(targets), tuple(exits), state, tuple(found))


def place_window(frames: int, spec: RolloutSpec, rng: torch.Generator) -> int:
    """The window's first frame, on the grid of chunks."""
    last = (frames - spec.window) // spec.chunk
    if spec.place == "last" or not last:
        return last * spec.chunk
    u = float(torch.rand((), generator=rng))
    if spec.place == "beta":
        u = 1 - (1 - u) ** 0.5  # inverse of Beta(1, 2)'s distribution
    return spec.chunk * min(int(u * (last + 1)), last)


def renoise_chunk(
    student: CausalStudent, text: Tensor, x_0: Tensor, sigmas: list[float], memory: Memory, rng: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Self-Forcing++'s backward noise initialisation: the chunk noised to one of the student's levels, and made from there."""
    level = int(torch.randint(len(sigmas), (), generator=rng))
    x_t = add_noise(x_0, draw_gaussian(x_0.shape, rng), x_0.new_full((len(x_0),), sigmas[level]))
    return student(x_t, x_t.new_full((len(x_t),), sigmas[level]), text, memory), x_t, level
