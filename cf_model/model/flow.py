"""The straight path between data and noise, x_σ = (1 - σ) x_0 + σ ε; its models predict the velocity ε - x_0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Noise = torch.Generator | Iterator[Tensor]  # drawn, or the next of what was drawn elsewhere: golden vectors store theirs


@dataclass(frozen=True)
class Flow:
    """Which noise levels the losses see. σ is in [0, 1]; only the transformer's door multiplies it by 1000."""

    shift: float  # moves levels towards 1; Wan 2.1 at 480p: 5
    sigma_min: float  # levels of the distillation losses (Self-Forcing's dmd.py: 0.02 to 0.98)
    sigma_max: float

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ValueError(f"shift is {self.shift}, which would move noise levels away from 1; use 1 or more")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; they must rise within 0..1")

    def warp(self, u: Tensor) -> Tensor:
        """Levels u, uniform in [0, 1], to shifted noise levels σ."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sampler_sigmas(self, steps: int) -> list[float]:
        """σ of a sampler with so many steps, from 1 down to 0, both ends included."""
        return self.warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()

    def shift_levels(self, levels: Sequence[float]) -> list[float]:
        """Shifted noise levels of a few-step model."""
        return self.warp(torch.tensor(levels, dtype=torch.float64)).tolist()

    def sample_sigma(self, batch: int, rng: Noise) -> Float[Tensor, " B"]:
        """For flow matching: the whole range, shifted."""
        return self.warp(draw_uniform((batch,), rng))

    def sample_score_sigma(self, batch: int, rng: Noise) -> Float[Tensor, " B"]:
        """For the scores of a distillation: shifted, then clamped, as Self-Forcing does."""
        return self.sample_sigma(batch, rng).clamp(self.sigma_min, self.sigma_max)

    def loss_weight(self, sigma: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Of a loss at these levels, as Wan was trained: a bell around 0.5 that is 0 at the lowest, with mean 1 over 1000 levels."""

        def bell(s: Tensor) -> Tensor:
            return torch.exp(-2 * (s - 0.5) ** 2)

        table = bell(self.warp(1 - torch.arange(1000, dtype=torch.float64) / 1000))
        lowest = table.min()
        return ((bell(sigma.double()) - lowest) / (table - lowest).mean()).to(sigma.dtype)


def check_levels_fall(levels: Sequence[float]) -> None:
    """Refuses the levels of a few-step model that do not fall."""
    if not levels or list(levels) != sorted(set(levels), reverse=True) or not 0 < levels[-1] <= levels[0] <= 1:
        raise ValueError(f"levels is {list(levels)}; they fall from at most 1 to above 0")


def add_noise(x_0: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    s = expand_sigma(sigma, x_0)
    return (1 - s) * x_0 + s * noise


def to_x0(x_t: Float[Tensor, "B *rest"], velocity: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    return x_t - expand_sigma(sigma, x_t) * velocity


def to_velocity(x_t: Float[Tensor, "B *rest"], x_0: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    """σ must not be 0: there x_t is x_0 and says nothing of the velocity."""
    return (x_t - x_0) / expand_sigma(sigma, x_t)


def expand_sigma(sigma: Float[Tensor, " B"], like: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (like.ndim - 1)).to(like)


def draw_gaussian(shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    """Noise from a generator of ours: drawn on its own device, so a seed means the same everywhere it lives."""
    return _draw_numbers(torch.randn, shape, rng)


def draw_uniform(shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    """Numbers in 0..1, from wherever `gaussian` takes its own."""
    return _draw_numbers(torch.rand, shape, rng)


class BatchGenerator(torch.Generator):
    """The random numbers of a whole batch: on the CPU, so that a seed means the same on every machine.

    A process that has only a part of the batch draws all of it and keeps its own rows, so however many of them there are,
    each sample gets the same numbers, and all go on from the same state. `device` is where the numbers are used. A process
    that takes its share in several groups, one after the other (cf_model/train/trainer/ranks.py), draws once: the first group keeps
    what is the later ones' on the tape.
    """

    def __init__(self, device: torch.device | str = "cpu", part: int = 0, parts: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.target, self.part, self.parts, self.groups = torch.device(device), part, parts, groups
        self.tape: list[tuple[list[Tensor], Tensor]] | None = None  # of each draw: every group's rows, and the state after it
        self.read = 0

    def __new__(cls, *_: object, **__: object) -> BatchGenerator:
        return super().__new__(cls)

    def own_rows(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.parts)[self.part].to(self.target)

    def drawn(self, make: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        group, rank = divmod(self.part, self.parts // self.groups)
        if self.tape is not None and group:
            rows, after = self.tape[self.read]
            self.read += 1
            self.set_state(after)
            return rows[group].to(self.target)
        whole = make((shape[0] * self.parts, *shape[1:]), generator=self)
        if self.tape is not None:
            own = whole.chunk(self.parts)[rank :: self.parts // self.groups]
            self.tape.append(([rows.clone() for rows in own], self.get_state()))
        return self.own_rows(whole)


def own_rows(whole: Tensor, rng: Noise) -> Tensor:
    """This process's rows of something that has one for every sample of the whole batch."""
    return rng.own_rows(whole) if isinstance(rng, BatchGenerator) else whole


def _draw_numbers(make: Callable[..., Tensor], shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    if isinstance(rng, BatchGenerator):
        return rng.drawn(make, tuple(shape))
    return make(shape, generator=rng, device=rng.device) if isinstance(rng, torch.Generator) else next(rng)
