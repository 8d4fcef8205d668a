"""What a bidirectional model sees of the past: the context teacher, the critic beside it, and their sampler."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import Flow, Noise, gaussian


class Score(Protocol):
    """What a view asks of a model (`Denoiser`): teacher and critic."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TeacherView:
    """Which latent frames the teacher sees before the ones it scores (docs/method.md 6.5), and at which noise level.

    sparse: the sink, every `stride`-th frame after it (the newest `slow` of them), the last `fast`: the slow-fast
    memory's layout. contiguous: the last sink + slow + fast frames. none: nothing.
    """

    context: Literal["sparse", "contiguous", "none"]
    sink: int
    slow: int
    fast: int
    stride: int
    context_sigma: Literal["shared", "zero"]  # the level that context frames are announced with

    def __post_init__(self) -> None:
        if min(self.sink, self.slow, self.fast) < 0 or self.stride < 1:
            stated = f"sink is {self.sink}, slow {self.slow}, fast {self.fast}, stride {self.stride}"
            raise ValueError(f"{stated}; use 0 or more, and a stride of 1 or more")

    def frames(self, start: int) -> list[int]:
        """Indices of the context for a target that begins at latent frame `start`."""
        if self.context == "none" or start == 0:
            return []
        if self.context == "contiguous":
            return list(range(max(0, start - self.sink - self.slow - self.fast), start))
        motion = range(max(self.sink, start - self.fast), start)
        first = max(self.sink, start - self.fast - self.slow * self.stride)
        slow = range(first, start - self.fast, self.stride)[-self.slow :] if self.slow else range(0)
        return [*range(min(self.sink, start)), *slow, *motion]

    def velocity(
        self, model: Score, x_t: Float[Tensor, "B F C H W"], sigma: Float[Tensor, " B"], text: Tensor, context: Float[Tensor, "B K C H W"]
    ) -> Float[Tensor, "B F C H W"]:
        """ε - x_0 of the target: one bidirectional pass over the clean context and the noisy target, times 0, 1, 2, …"""
        seen = context.shape[1]
        if not seen:
            return model.velocity(x_t, sigma, text)
        levels: Tensor = sigma
        if self.context_sigma == "zero":
            levels = torch.cat([sigma.new_zeros(len(sigma), seen), sigma[:, None].expand(-1, x_t.shape[1])], dim=1)
        return model.velocity(torch.cat([context, x_t], dim=1), levels, text)[:, seen:]


@torch.no_grad()
def sample(
    model: Score,
    text: Float[Tensor, "B T E"],
    context: Float[Tensor, "B K C H W"],
    shape: tuple[int, int, int, int],
    *,
    view: TeacherView,
    flow: Flow,
    steps: int,
    guidance: float,
    rng: Noise,
    null: Float[Tensor, "T E"],
) -> Float[Tensor, "B F C H W"]:
    """Euler steps from noise to the frames after `context`; shape is F, C, H, W."""
    x = gaussian((len(text), *shape), rng)
    levels = flow.levels(steps)
    for high, low in pairwise(levels):
        sigma = x.new_full((len(x),), high)
        velocity = view.velocity(model, x, sigma, text, context)
        if guidance != 1:
            away = view.velocity(model, x, sigma, null.expand_as(text), context)
            velocity = away + guidance * (velocity - away)
        x = x + (low - high) * velocity
    return x
