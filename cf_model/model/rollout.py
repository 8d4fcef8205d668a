"""Self-rollout: the student makes its own video chunk by chunk, in training as at inference (alg. 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import Flow, add_noise, gaussian
from .memory import ContextMemory, MemorySpec


class Causal(Protocol):
    """What a rollout asks of a model (`Denoiser`)."""

    def __call__(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: ContextMemory | None = None) -> Tensor: ...

    def remember(self, x_0: Tensor, text: Tensor, memory: ContextMemory, *, grad: bool = False) -> ContextMemory: ...


@dataclass(frozen=True)
class RolloutSpec:
    """How a chunk is denoised, and which frames of a training rollout are scored."""

    chunk: int  # latent frames made together
    levels: tuple[float, ...]  # before the shift; Self-Forcing: 1, 0.75, 0.5, 0.25
    window: int  # latent frames that are scored, at the rollout's end
    exit: Literal["shared", "last"]  # where the target's chunks stop: one random level for all of them, or the last
    full_denoise: Literal["none", "context"]  # chunks that always take every level
    skip_first: int  # chunks of the target, from its start, that are fully denoised and carry no gradient

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.window % self.chunk:
            raise ValueError(f"window is {self.window}, not whole chunks of {self.chunk} latent frames")
        if not self.levels or list(self.levels) != sorted(set(self.levels), reverse=True) or self.levels[0] > 1 or self.levels[-1] <= 0:
            raise ValueError(f"levels is {list(self.levels)}; they fall from at most 1 to above 0")
        if not 0 <= self.skip_first < self.window // self.chunk:
            chunks = self.window // self.chunk
            raise ValueError(f"skip_first is {self.skip_first}; the window has {chunks} chunks and one must carry gradient")

    def sigmas(self, flow: Flow) -> list[float]:
        return flow.warp(torch.tensor(self.levels, dtype=torch.float64)).tolist()


@dataclass(frozen=True)
class HorizonSpec:
    """The rollout curriculum: latent frames of a rollout, uniform up to a maximum that grows (alg. 1, line 6)."""

    shortest: int
    longest: int
    decay: int  # steps until the maximum is reached; 0: at once

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.decay < 0:
            stated = f"shortest is {self.shortest}, longest {self.longest}, decay {self.decay}"
            raise ValueError(f"{stated}; use 1 <= shortest <= longest and 0 <= decay")

    def sample(self, step: int, chunk: int, rng: torch.Generator) -> int:
        # Choice: min(1, ·), or the length would grow without bound; both ends included; whole chunks.
        progress = min(1.0, step / self.decay) if self.decay else 1.0
        longest = self.shortest + progress * (self.longest - self.shortest)
        return chunk * int(torch.randint(self.shortest // chunk, int(longest) // chunk + 1, (), generator=rng))


@dataclass(frozen=True, eq=False)
class Target:
    """One scored chunk of a rollout: its pass can be replayed, with gradient, from what is here."""

    first: int  # latent frame
    x_t: Float[Tensor, "B F C H W"]
    sigma: float
    memory: ContextMemory
    grad: bool


@dataclass(frozen=True, eq=False)
class Rollout:
    video: Float[Tensor, "B F C H W"]
    window: slice
    targets: tuple[Target, ...]
    exit: int
    memory: ContextMemory
    similarities: tuple[float, ...]  # of each chunk's keys to the chunk before


def stream(
    student: Causal,
    text: Float[Tensor, "B T E"],
    shape: tuple[int, int, int],
    *,
    sigmas: list[float],
    chunk: int,
    memory: ContextMemory,
    rng: torch.Generator,
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Chunks without end, every one fully denoised. `memory` may already hold a real prefix."""
    while True:
        with torch.no_grad():
            x_0, _ = denoise(student, text, shape, sigmas, chunk, memory, rng)
            memory = student.remember(x_0, text, memory)
        yield x_0


def denoise(
    student: Causal,
    text: Tensor,
    shape: tuple[int, int, int],
    sigmas: list[float],
    chunk: int,
    memory: ContextMemory,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One chunk from noise down the given levels: its x_0, and the x_t that the last level saw."""
    x_t = gaussian((len(text), chunk, *shape), rng)
    x_0 = x_t
    for step, sigma in enumerate(sigmas):
        if step:
            x_t = add_noise(x_0, gaussian(x_0.shape, rng), x_t.new_full((len(x_t),), sigma))
        x_0 = student(x_t, x_t.new_full((len(x_t),), sigma), text, memory)
    return x_0, x_t


@torch.no_grad()
def rollout(
    student: Causal,
    text: Float[Tensor, "B T E"],
    frames: int,
    shape: tuple[int, int, int],
    *,
    spec: RolloutSpec,
    memory: MemorySpec,
    flow: Flow,
    rng: torch.Generator,
) -> Rollout:
    """A video of the student's own making, without a graph; its `targets` are replayed by the loss.

    Clean context policy (sec. 3.2): chunks before the window take every level. Inside it all chunks stop at one random
    level (Self Forcing, alg. 1). A chunk is remembered as the student left it, by a pass at σ = 0.
    """
    sigmas = spec.sigmas(flow)
    window = slice(frames - spec.window, frames)
    shared = int(torch.randint(len(sigmas), (), generator=rng))
    leave = shared if spec.exit == "shared" else len(sigmas) - 1
    state, video, targets, similarities = ContextMemory(memory), [], [], []
    for first in range(0, frames, spec.chunk):
        grad = first >= window.start + spec.skip_first * spec.chunk
        # Choice: with full_denoise none the context exits early too, which is Self-Forcing's training.
        early = grad or (first < window.start and spec.full_denoise == "none")
        steps = sigmas[: leave + 1] if early else sigmas
        x_0, x_t = denoise(student, text, shape, steps, spec.chunk, state, rng)
        if first >= window.start:
            targets.append(Target(first, x_t, steps[-1], state, grad))
        video.append(x_0)
        state = student.remember(x_0, text, state)
        if state.similarity is not None:
            similarities.append(state.similarity)
    return Rollout(torch.cat(video, dim=1), window, tuple(targets), leave, state, tuple(similarities))
