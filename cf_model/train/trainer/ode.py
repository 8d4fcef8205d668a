"""Integrate the probability-flow ODE of a bidirectional model from noise to video."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser


@torch.no_grad()
def trace_ode(
    model: Denoiser,
    text: Float[Tensor, "B T E"],
    noise: Float[Tensor, "B F C H W"],
    *,
    levels: list[float],
    guidance: float,
    null: Float[Tensor, "T E"],
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Yield the state before every Euler step of dx/dσ = v(x, σ), the noise first and x_0 last.

    `levels` are the noise levels, from 1 down to 0. v is null + guidance (cond - null); with guidance 1 the null prompt costs nothing.
    """
    device = next(model.parameters()).device
    x, text, null = noise.to(device), text.to(device), null.to(device)
    yield x
    for high, low in pairwise(levels):
        sigma = x.new_full((len(x),), high)
        # One bidirectional pass over all frames: [B, F, C, H, W].
        velocity = model.velocity(x, sigma, text)
        if guidance != 1:
            unconditional = model.velocity(x, sigma, null.expand_as(text))
            velocity = unconditional + guidance * (velocity - unconditional)
        # Euler: dσ = low - high, below 0.
        x = x + (low - high) * velocity
        yield x
