"""Flow matching: the straight path between data and noise, and the noise levels that each loss and sampler takes.

    x_σ = (1 - σ) x_0 + σ ε        v = ε - x_0        x_0 = x_σ - σ v

Models predict the velocity v. σ = 0 is data, σ = 1 is noise; alg. 1 calls a few-step model's levels t_1 .. t_T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class RowGenerators:
    """A generator for each video of a batch, so that a video's numbers do not depend on what is generated beside it."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def draw_rows(self, make: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Draw each row of a tensor of this shape from its own generator."""
        return torch.cat([make((1, *shape[1:]), generator=rng, device=rng.device) for rng in self.generators])


# A generator to draw from, one for each video, or numbers that were drawn before, as golden vectors store them.
Noise = torch.Generator | RowGenerators | Iterator[Tensor]


@dataclass(frozen=True)
class Flow:
    """Noise levels σ in [0, 1] of losses and samplers; only `Denoiser` multiplies σ by 1000, as Wan's time embedding wants."""

    shift: float  # moves levels towards 1; Wan 2.1 at 480p: 5
    sigma_min: float  # levels of the distillation losses (Self-Forcing's dmd.py: 0.02 to 0.98)
    sigma_max: float

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ValueError(f"shift is {self.shift}, which would move noise levels away from 1; use 1 or more")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; they must rise within 0..1")

    def warp(self, u: Tensor) -> Tensor:
        """Shift levels u in [0, 1] towards noise: σ = s u / (1 + (s - 1) u) with s = `shift`."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sampler_sigmas(self, steps: int) -> list[float]:
        """Return the `steps` + 1 levels of a many-step sampler, from 1 down to 0, both ends included."""
        # float64, so that levels are the same on every device
        return self.warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()

    def shift_levels(self, levels: Sequence[float]) -> list[float]:
        """Return the shifted noise levels of a few-step model, whose levels before the shift are `levels`."""
        return self.warp(torch.tensor(levels, dtype=torch.float64)).tolist()

    def sample_sigma(self, batch: int, rng: Noise) -> Float[Tensor, " B"]:
        """Draw one level a sample for flow matching: uniform in [0, 1], then shifted."""
        return self.warp(draw_uniform((batch,), rng))

    def sample_score_sigma(self, batch: int, rng: Noise) -> Float[Tensor, " B"]:
        """Draw one level a sample for the scores of eqs. 4 and 6: shifted, then clamped, as Self-Forcing does."""
        return self.sample_sigma(batch, rng).clamp(self.sigma_min, self.sigma_max)

    def loss_weight(self, sigma: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Weigh a loss at these levels, as Wan was trained: exp(-2 (σ - 1/2)²) less its minimum, with mean 1 over the 1000 levels.

        Self-Forcing states the bell in t = 1000 σ: exp(-2 ((t - 500) / 1000)²).
        """

        def bell(s: Tensor) -> Tensor:
            return torch.exp(-2 * (s - 0.5) ** 2)

        # The 1000 levels of training, shifted: their mean weight is 1 and their lowest weight is 0.
        table = bell(self.warp(1 - torch.arange(1000, dtype=torch.float64) / 1000))
        lowest = table.min()
        return ((bell(sigma.double()) - lowest) / (table - lowest).mean()).to(sigma.dtype)


def check_levels_fall(levels: Sequence[float]) -> None:
    """Raise ValueError unless a few-step model's levels fall within (0, 1]."""
    if not levels or list(levels) != sorted(set(levels), reverse=True) or not 0 < levels[-1] <= levels[0] <= 1:
        raise ValueError(f"levels is {list(levels)}; they fall from at most 1 to above 0")


def add_noise(x_0: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    """Return x_σ = (1 - σ) x_0 + σ ε (alg. 1's addnoise)."""
    s = expand_sigma(sigma, x_0)  # [B, 1, …]
    return (1 - s) * x_0 + s * noise


def to_x0(x_t: Float[Tensor, "B *rest"], velocity: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    """Return x_0 = x_σ - σ v."""
    return x_t - expand_sigma(sigma, x_t) * velocity


def to_velocity(x_t: Float[Tensor, "B *rest"], x_0: Float[Tensor, "B *rest"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
    """Return v = (x_σ - x_0) / σ. σ must not be 0: there x_σ is x_0 and says nothing of the velocity."""
    # from x_0 = x_σ - σ v
    return (x_t - x_0) / expand_sigma(sigma, x_t)


def expand_sigma(sigma: Float[Tensor, " B"], like: Tensor) -> Tensor:
    """Return σ as [B, 1, 1, …], so that it multiplies `like` sample by sample."""
    return sigma.view(-1, *[1] * (like.ndim - 1)).to(like)


def draw_gaussian(shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    """Draw normal numbers on the generator's own device, so that a seed means the same wherever the model is."""
    return _draw_numbers(torch.randn, shape, rng)


def draw_uniform(shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    """Draw numbers in [0, 1], from wherever `draw_gaussian` takes its own."""
    return _draw_numbers(torch.rand, shape, rng)


class BatchGenerator(torch.Generator):
    """Random numbers of a batch that several processes share: drawn on the CPU, so that a seed means the same on every machine.

    Each process draws the numbers of the complete batch and keeps its own rows, so that a sample gets the same numbers
    however many processes there are, and all of them go on from the same state. `device` is where the numbers are used.
    A process that takes its share in several groups, one after the other (cf_model/train/trainer/ranks.py), draws once:
    the first group leaves the later groups' rows on the tape.
    """

    def __init__(self, device: torch.device | str = "cpu", part: int = 0, parts: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.target, self.part, self.parts, self.groups = torch.device(device), part, parts, groups
        self.tape: list[tuple[list[Tensor], Tensor]] | None = None  # for each draw: every group's rows, and the state after it
        self.read = 0

    def __new__(cls, *_: object, **__: object) -> BatchGenerator:
        return super().__new__(cls)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return this process's rows of a tensor with a row for every sample of the batch, where they are used."""
        return batch.chunk(self.parts)[self.part].to(self.target)

    def draw_rows(self, make: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Draw for the complete batch and return this process's rows; `shape` is that of its own rows."""
        group, rank = divmod(self.part, self.parts // self.groups)
        if self.tape is not None and group:
            # a later group: its rows were drawn with the first group's, and the state goes on from there
            rows, after = self.tape[self.read]
            self.read += 1
            self.set_state(after)
            return rows[group].to(self.target)
        # all rows of the batch, of which this process keeps its own
        batch = make((shape[0] * self.parts, *shape[1:]), generator=self)
        # the first of several groups: keep the later groups' rows, and the state that follows
        if self.tape is not None:
            parts = batch.chunk(self.parts)[rank :: self.parts // self.groups]
            self.tape.append(([rows.clone() for rows in parts], self.get_state()))
        return self.own_rows(batch)


def own_rows(batch: Tensor, rng: Noise) -> Tensor:
    """Return this process's rows of a tensor with a row for every sample of the batch; any other generator means all of them."""
    return rng.own_rows(batch) if isinstance(rng, BatchGenerator) else batch


def _draw_numbers(make: Callable[..., Tensor], shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    if isinstance(rng, BatchGenerator | RowGenerators):
        return rng.draw_rows(make, tuple(shape))
    # an iterator hands out numbers that were drawn elsewhere
    return make(shape, generator=rng, device=rng.device) if isinstance(rng, torch.Generator) else next(rng)
