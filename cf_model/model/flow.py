"""Flow matching: the straight path between data and noise, and the noise levels that each loss and sampler takes.

    x_σ = (1 - σ) x_0 + σ ε        v = ε - x_0        x_0 = x_σ - σ v

Models predict the velocity v. σ = 0 is data, σ = 1 is noise; alg. 1 calls a few-step model's levels t_1 .. t_T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class BatchGenerator(torch.Generator):
    """Random numbers of a batch of videos: a stream for each video, and one on the CPU for the few numbers that the batch shares.

    A stream follows from its identity alone, which is a seed and further numbers, as step and row in training. So a video gets the
    same numbers whatever else is in the batch, wherever the batch is cut, and in a run that was resumed; a rank draws only its own
    rows, on the device that uses them, and no state is saved. On a GPU torch's generator is Philox 4x32-10: the identity is its key,
    and chunk and noise level are in its counter, because a video draws them one after the other. A CPU's is the Mersenne Twister.

    As a torch.Generator this is the shared stream: clips, lengths and exit levels, drawn alike by all ranks.
    """

    def __init__(
        self, videos: Iterable[tuple[int, ...]], device: torch.device | str = "cpu", *, shared: tuple[int, ...] = (0,), first: int = 0
    ) -> None:
        """`videos` and `shared` are identities; `first` is the first video's row in a batch of which other processes have the rest."""
        super().__init__()
        self.manual_seed(derive_seed(*shared))
        self.device_of_rows, self.first = torch.device(device), first
        self.rows = [torch.Generator(device).manual_seed(derive_seed(*video)) for video in videos]

    def __new__(cls, *_: object, **__: object) -> BatchGenerator:
        return super().__new__(cls)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return these videos' rows of a tensor with a row for every video of the complete batch, where they are used."""
        return batch[self.first : self.first + len(self.rows)].to(self.device_of_rows)

    def draw_rows(self, make: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Draw each row of a tensor of this shape from its own stream."""
        assert shape[0] == len(self.rows), f"{shape[0]} rows are drawn for {len(self.rows)} videos"
        return torch.cat([make((1, *shape[1:]), generator=row, device=row.device) for row in self.rows])


def derive_seed(seed: int, *more: int) -> int:
    """Return the 64-bit seed of the stream that these numbers name; other numbers, or more of them, name an independent stream."""
    return int(np.random.SeedSequence(seed, spawn_key=more).generate_state(1, np.uint64)[0])


# Where random numbers come from: a stream for each video, one for the whole tensor, or numbers that were drawn before (golden vectors).
Noise = torch.Generator | Iterator[Tensor]


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


def own_rows(batch: Tensor, rng: Noise) -> Tensor:
    """Return this process's rows of a tensor with a row for every sample of the batch; any other generator means all of them."""
    return rng.own_rows(batch) if isinstance(rng, BatchGenerator) else batch


def _draw_numbers(make: Callable[..., Tensor], shape: torch.Size | tuple[int, ...], rng: Noise) -> Tensor:
    if isinstance(rng, BatchGenerator):
        return rng.draw_rows(make, tuple(shape))
    # an iterator hands out numbers that were drawn elsewhere
    return make(shape, generator=rng, device=rng.device) if isinstance(rng, torch.Generator) else next(rng)
