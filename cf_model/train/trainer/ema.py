"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cf_model.model.precision import forget_copies

from .zero import gather_weights

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """Exponential moving average of a model's weights. Videos are generated with the average, rollouts use the raw weights.

    `model` is the averaged copy, whole on every rank. The average equals the raw weights for the first `start` updates. With `ramp` the
    decay rises to `decay` over the updates.
    """

    def __init__(self, model: Model, decay: float, start: int = 0, *, ramp: bool = True) -> None:
        self.source, self.decay, self.start, self.ramp, self.done = model, decay, start, ramp, 0
        self.model: Model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Move the average towards the raw weights. Return |average - raw| / |raw| over the weights that learn."""
        # Choice: with `ramp` a rising decay, so that a short run's average is not its starting point.
        rising = (1 + self.done) / (10 + self.done) if self.ramp else 1.0
        decay = min(self.decay, rising) if self.done >= self.start else 0.0
        # With ZeRO 3 each raw weight is gathered in turn, so that never more than one is whole at a time.
        norms = []
        for mean, raw in zip(self.model.parameters(), gather_weights(self.source), strict=True):
            mean.lerp_(raw, 1 - decay)  # mean <- decay * mean + (1 - decay) * raw
            if raw.requires_grad:
                norms.append(torch.stack([(mean - raw).norm(), raw.norm()]).float())
        self.done += 1
        forget_copies(self.model)
        distance, size = torch.stack(norms).norm(dim=0)  # norms is [weights, 2]
        return distance / size

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
