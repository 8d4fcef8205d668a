"""Self-rollout: the student makes its own video chunk by chunk, in training as at inference (alg. 1, lines 6 to 28).

`stream` is inference, `rollout` is a training step's video, and both make a chunk by `denoise_chunk`. A rollout keeps no
graph: the loss replays the exit pass of each scored chunk with gradient (cf_model/train/student.py), which costs the memory
of one chunk instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .context import HeldFrames, find_held_frames
from .flow import Flow, Noise, add_noise, check_levels_fall, draw_gaussian
from .key_values import Frames, KeyValues
from .memory import ChunkComparison, Memory, MemorySpec, compare_newest_chunk, empty_memory


class CausalStudent(Protocol):
    """The student as a rollout uses it (`Denoiser`)."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None = None) -> Tensor: ...

    def offer(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...

    def remember(
        self, x_0: Tensor, text: Tensor, memory: Memory, *, grad: bool = False, disturb: Callable[[Frames], Frames] | None = None
    ) -> Memory: ...

    def remember_and_denoise(self, x_0: Tensor, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory) -> tuple[Tensor, Memory]: ...

    def forget_store(self, memory: Memory) -> None: ...


@dataclass(frozen=True)
class RolloutSpec:
    """How a chunk is denoised, and which frames of a training rollout the scores of eqs. 4 and 6 see."""

    chunk: int  # latent frames that are denoised together
    levels: tuple[float, ...]  # t_1 > .. > t_T of alg. 1, before the shift; Self-Forcing: 1, 0.75, 0.5, 0.25
    window: int  # latent frames that are scored: l of alg. 1
    place: Literal["last", "uniform", "beta"]  # of the window: the rollout's end (alg. 1), or anywhere in it (Self-Forcing++; Beta(1, 2))
    # score the window as the rollout left it, or made again from its own x_0 and fresh noise (Self-Forcing++)
    renoise: Literal["none", "own"]
    # r of alg. 1, where the window's chunks stop, and so the pass with gradient: one random level for all, one a chunk, or the last
    exit: Literal["shared", "per_chunk", "last"]
    # chunks before the window that take every level (clean context policy, sec. 3.2); context: as many as a memory holds
    full_denoise: Literal["none", "context", "all"]
    full_first: int  # chunks of the window, from its start, that take every level
    skip_first: int  # chunks of the window, from its start, that carry no gradient
    persist: Literal["fresh", "stream"]  # every step a new video, or the next part of the one before (LongLive's long tuning)
    # what the window continues: the student's own video (E over p_θ, eq. 5); a training clip's beginning (Assumption 2 taken literally);
    # real beginnings at first and then fewer and fewer; or the student's own continuation of a clip's beginning, of any length
    begin: Literal["own", "real", "share", "mixed"]
    cache_noise: float  # of remembered keys and values: its standard deviation over their root mean square (Self-Forcing++, A.3)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.window % self.chunk:
            raise ValueError(f"window is {self.window}, not whole chunks of {self.chunk} latent frames")
        check_levels_fall(self.levels)
        if not 0 <= self.skip_first <= self.full_first < self.window // self.chunk:
            problem = f"skip_first is {self.skip_first}, full_first {self.full_first}, of {self.window // self.chunk} chunks in the window"
            raise ValueError(f"{problem}; use 0 <= skip_first <= full_first, and leave one chunk that exits early")
        if self.persist == "stream" and (self.place != "last" or not self.skip_first):
            problem = f"place is {self.place} and skip_first {self.skip_first}, but persist is stream"
            raise ValueError(f"{problem}: a stream's window is its end and overlaps the one before; use place: last and skip_first: 1")
        if self.begin != "own" and (self.place != "last" or self.persist == "stream"):
            problem = f"begin is {self.begin}, but place is {self.place} and persist {self.persist}"
            raise ValueError(f"{problem}: the window follows a clip's beginning; use place: last and persist: fresh, or begin: own")
        if self.cache_noise < 0:
            raise ValueError(f"cache_noise is {self.cache_noise}, but it is a standard deviation; use 0 or more")


@dataclass(frozen=True)
class HorizonSpec:
    """Long self-rollout curriculum (sec. 3.2): a rollout's latent frames, uniform up to a maximum that grows (alg. 1, line 6)."""

    shortest: int  # L0
    longest: int  # L1
    decay: int  # s_d, steps until the maximum is reached; 0: at once
    mode: Literal["linear", "exp", "const"]  # how it grows; const: every rollout is `longest`

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.decay < 0:
            problem = f"shortest is {self.shortest}, longest {self.longest}, decay {self.decay}"
            raise ValueError(f"{problem}; use 1 <= shortest <= longest and 0 <= decay")

    def sample_length(self, step: int, chunk: int, rng: torch.Generator) -> int:
        """Draw L of alg. 1, line 6: Uniform(L0, L0 + s / s_d (L1 - L0)), in latent frames and whole chunks."""
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
    """One scored chunk of a rollout: all that its exit pass needs to be replayed with gradient."""

    first: int  # its first latent frame
    x_t: Float[Tensor, "B F C H W"]  # what the exit pass was given
    sigma: float  # the level of that pass
    memory: Memory  # what that pass looked at
    grad: bool  # False in the first `skip_first` chunks of the window


@dataclass(frozen=True, eq=False)
class Rollout:
    """A video of the student's own, the window of it that is scored, and the memory after it."""

    video: Float[Tensor, "B F C H W"]  # X of alg. 1, with the video that it continues
    window: slice  # latent frames that are scored
    targets: tuple[TargetChunk, ...]
    exits: tuple[int, ...]  # number of the exit level of each scored chunk
    memory: Memory
    comparisons: tuple[ChunkComparison, ...]  # of each new chunk with the chunk before it
    held: HeldFrames | None  # what the memory held when the window began; None: it began in the part that this rollout continues


def stream(
    student: CausalStudent,
    text: Float[Tensor, "B T E"],
    shape: tuple[int, int, int],
    *,
    sigmas: list[float],
    chunk: int,
    memory: Memory,
    rng: Noise,
    merged: bool = False,
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Yield chunks without end, each denoised down to the last level. `memory` may already hold a real prefix.

    `merged`: a chunk is yielded before its clean pass, which is then one with the next chunk's first step.
    """
    finished: Tensor | None = None  # chunk that is not remembered yet
    while True:
        with torch.no_grad():
            # alg. 1 with r' = T for every chunk, and the clean pass of line 21
            x_0, _, memory = denoise_chunk(student, text, shape, sigmas, chunk, memory, rng, finished)
            # merged: the clean pass waits for the next chunk's noise; a video's last chunk is never remembered
            if merged:
                finished = x_0
            else:
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
    finished: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Memory], Memory]:
    """Denoise one chunk from noise down the given levels (alg. 1, lines 9 to 28).

    Returns x_0 [B, F, C, H, W], the x_t and memory that the last level was given, and the memory after the chunk's passes.
    A chunk before it that is `finished` but not in the memory yet is remembered by the first pass.
    """
    return descend_levels(student, text, draw_gaussian((len(text), chunk, *shape), rng), sigmas, memory, rng, finished)  # line 9


def descend_levels(
    student: CausalStudent, text: Tensor, x_t: Tensor, sigmas: list[float], memory: Memory, rng: Noise, finished: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Memory], Memory]:
    """Denoise a chunk from x_t, at the first of the given levels, down to the last. Returns what `denoise_chunk` does."""
    if finished is not None and memory.spec.timing == "first_call":  # its noisy passes are compared with the chunk before
        memory, finished = student.remember(finished, text, memory), None
    x_0, memory_before = x_t, memory
    for step, sigma in enumerate(sigmas):  # line 15
        if step:  # lines 25 and 26: back to the next level with fresh noise
            x_t = add_noise(x_0, draw_gaussian(x_0.shape, rng), x_t.new_full((len(x_t),), sigma))
        memory_before, level = memory, x_t.new_full((len(x_t),), sigma)
        if finished is not None and not step:  # line 21 of the chunk before, with line 18 of this one
            x_0, memory = student.remember_and_denoise(finished, x_t, level, text, memory)
            memory_before = memory
        elif memory.spec.timing == "first_call":
            x_0, memory = student.offer(x_t, level, text, memory)  # this pass's keys may promote the chunk
        else:
            x_0 = student(x_t, level, text, memory)  # lines 18 and 24
    return x_0, (x_t, memory_before), memory


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
) -> Rollout:
    """Make `frames` latent frames of the student's own video, without a graph; the loss replays its `targets`.

    Clean context policy (sec. 3.2): chunks before the window take every level. Inside the window chunks stop at a random
    level (Self Forcing; alg. 1, lines 10 to 14). Each chunk is remembered as the student left it, by a pass at σ = 0.
    Nothing after the window is made. With `past` the video goes on where that rollout ended, and the window begins with
    its last frames. `shape` is C, H, W of a latent.
    """
    sigmas = flow.shift_levels(spec.levels)  # t_1 .. t_T
    # the window is the target X[L - l:]; what came before it is the context
    start = place_window(frames, spec, rng)
    window = slice(start, start + spec.window)
    shared = int(torch.randint(len(sigmas), (), generator=rng))  # line 7: the random exit r
    state = past.memory if past else empty_memory(memory)
    # Self-Forcing++, alg. 1, line 4: one level t for the window. Choice: it is uniform among those down to the pass with gradient.
    noised_to = float(torch.rand((), generator=rng)) if spec.renoise == "own" else 0.0
    disturb = partial(disturb_frames, share=spec.cache_noise, rng=rng) if spec.cache_noise else None
    video, targets, exits, comparisons = [past.video] if past else [], [], [], list[ChunkComparison]()
    held: HeldFrames | None = None
    for first in range(past.video.shape[1] if past else 0, window.stop, spec.chunk):  # line 8
        scored = first >= start
        into = (first - start) // spec.chunk  # chunks since the window began
        # Choice: with full_denoise none the context exits early too, which is Self-Forcing's training.
        clean = spec.full_denoise == "all" or (spec.full_denoise == "context" and first >= start - memory.size)
        # lines 10 to 14: r' = T for the context and for the first chunks of the window, r' = r for the others
        leave = len(sigmas) - 1
        if into >= spec.full_first or not (scored or clean):
            leave = {"shared": shared, "last": leave, "per_chunk": -1}[spec.exit]
            leave = int(torch.randint(len(sigmas), (), generator=rng)) if leave < 0 else leave
        if first == start:
            held = find_held_frames(state)  # line 29: v_c, if the scores are shown what the student remembers
        # a window that is noised again is finished first
        last, before = len(sigmas) - 1 if scored and spec.renoise == "own" else leave, state
        x_0, (x_t, memory_of_exit), state = denoise_chunk(student, text, shape, sigmas[: last + 1], spec.chunk, state, rng)
        state = student.remember(x_0, text, state, disturb=disturb)  # line 21: C <- G(x_0, 0, C)
        # what the loss needs of a scored chunk (lines 29 and 30): its exit pass, and whether that pass has a gradient
        if scored:
            exits.append(leave)
            if spec.renoise == "own":
                begin = int(noised_to * (leave + 1))
                x_0, (x_t, memory_of_exit) = renoise_chunk(student, text, x_0, sigmas[begin : leave + 1], before, rng)
                student.forget_store(before)
            targets.append(TargetChunk(first, x_t, sigmas[leave], memory_of_exit, into >= spec.skip_first))
        video.append(x_0)  # line 19
        comparisons += compare_newest_chunk(state)
    # The memory lives on, with the frames that the targets are replayed with; what passes have copied of them must not.
    student.forget_store(state)
    return Rollout(torch.cat(video, dim=1), window, tuple(targets), tuple(exits), state, tuple(comparisons), held)


def place_window(frames: int, spec: RolloutSpec, rng: torch.Generator) -> int:
    """Return the window's first latent frame, on the grid of chunks: L - l of alg. 1, or a random place (Self-Forcing++)."""
    last = (frames - spec.window) // spec.chunk
    if spec.place == "last" or not last:
        return last * spec.chunk
    # uniform, or Beta(1, 2), which prefers early windows
    u = float(torch.rand((), generator=rng))
    if spec.place == "beta":
        u = 1 - (1 - u) ** 0.5  # inverse of Beta(1, 2)'s distribution
    return spec.chunk * min(int(u * (last + 1)), last)


def renoise_chunk(
    student: CausalStudent, text: Tensor, x_0: Tensor, sigmas: list[float], memory: Memory, rng: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Memory]]:
    """Noise a chunk to the first of these levels and denoise it down to the last: Self-Forcing++'s backward noise initialisation.

    Returns the new x_0, and the x_t and memory that the last level was given, which is the pass with gradient.
    """
    x_t = add_noise(x_0, draw_gaussian(x_0.shape, rng), x_0.new_full((len(x_0),), sigmas[0]))
    x_0, given, _ = descend_levels(student, text, x_t, sigmas, memory, rng)
    return x_0, given


def disturb_frames(frames: Frames, share: float, rng: Noise) -> Frames:
    """Add normal numbers to keys and values before they are remembered, as large as `share` of their root mean square (A.3).

    The paper states no size. Choice: relative to each video's, layer's and frame's own, because layers differ in theirs.
    """

    def disturb(x: Float[Tensor, "B S N D"]) -> Tensor:
        size = x.float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return (x + share * size * draw_gaussian(x.shape, rng)).to(x.dtype)

    return tuple(KeyValues(f.index, tuple(map(disturb, f.keys)), tuple(map(disturb, f.values))) for f in frames)
