"""Muon: momentum whose update is orthogonalised, for the matrices of the transformer's blocks.

`torch.optim.Muon` fixes its Newton-Schulz iteration to bfloat16. On a processor without bfloat16 arithmetic, as most laptops have,
those products take 20 times as long as in float32, and nine tenths of a small run's time. `Muon` here has the same state, options and
rule, and chooses the precision by the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.weights import choose_precision

# Source: Keller Jordan's Muon, the values of torch.optim.Muon. The quintic's coefficients bring singular values near 1 in five rounds.
COEFFICIENTS, ROUNDS, EPSILON = (3.4445, -4.775, 2.0315), 5, 1e-7


def orthogonalize(matrix: Float[Tensor, "R C"], precision: torch.dtype) -> Float[Tensor, "R C"]:
    """Replace U S V^T by about U V^T, by five rounds of the quintic Newton-Schulz iteration in `precision`."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(precision)
    x = x.mT if tall else x  # the Gram matrix of the shorter side is the smaller one
    x = x / x.norm().clamp(min=EPSILON)  # the iteration needs singular values of at most 1
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` in the precision of `choose_precision`; a checkpoint of one loads into the other."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                # Nesterov: the update looks ahead along the momentum.
                update = weight.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                # Tall matrices get a larger step, so that an update's size does not depend on the shape.
                rate = group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                # Decoupled weight decay, as AdamW's.
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalize(update, choose_precision(weight.device)).to(weight.dtype), alpha=-rate)
