"""Error-recycling fine-tuning (sec. 3.4): the teacher is shown its own past mistakes, and undoes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.flow import add_noise, gaussian
from cf_model.model.view import Score, TeacherView


@dataclass(frozen=True)
class ErrorSpec:
    """How often past mistakes are added back, and how many are kept."""

    context: float  # chance that the context gets one
    latent: float  # that the target does
    noise: float  # that its noise does
    clean: float  # that a step stays clean altogether
    clean_update: float  # chance that a clean step's mistakes enter the bank
    segments: Literal["fast", "slow_fast", "all"]  # frames of the context that can get one
    grids: int  # noise levels that mistakes are sorted into
    per_grid: int  # mistakes kept of each level
    warmup: int  # steps in which mistakes are only collected

    def __post_init__(self) -> None:
        for name in ("context", "latent", "noise", "clean", "clean_update"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it is a chance; use a value in 0..1")
        if self.grids < 1 or self.per_grid < 1:
            raise ValueError(f"grids is {self.grids} and per_grid {self.per_grid}; the bank holds at least one mistake")


class ErrorBank:
    """Past mistakes of the teacher, by noise level: what it took for x_0, and for ε, minus the truth.

    A full level replaces the stored mistake that is nearest to the new one, so the bank stays varied. It is bounded,
    drawn from with a seeded generator, and part of the checkpoint.
    """

    def __init__(self, spec: ErrorSpec, shape: tuple[int, ...]) -> None:
        self.spec = spec
        size = (spec.grids, spec.per_grid, *shape)
        self.stored = {"latent": torch.zeros(size), "noise": torch.zeros(size)}
        self.count = torch.zeros(spec.grids, dtype=torch.long)

    def grid(self, sigma: float) -> int:
        return min(self.spec.grids - 1, int(sigma * self.spec.grids))

    def add(self, sigma: float, latent: Tensor, noise: Tensor) -> None:
        grid = self.grid(sigma)
        slot = int(self.count[grid])
        if slot == self.spec.per_grid:
            slot = int((self.stored["latent"][grid] - latent).flatten(1).norm(dim=1).argmin())
        else:
            self.count[grid] += 1
        self.stored["latent"][grid, slot], self.stored["noise"][grid, slot] = latent, noise

    def draw(self, kind: Literal["latent", "noise"], rng: torch.Generator, sigma: float | None = None) -> Tensor | None:
        """A mistake of the given level, or of any; None while there is none."""
        grids = self.count.nonzero().flatten().tolist() if sigma is None else [self.grid(sigma)]
        filled = [g for g in grids if self.count[g]]
        if not filled:
            return None
        grid = filled[int(torch.randint(len(filled), (), generator=rng))]
        return self.stored[kind][grid, int(torch.randint(int(self.count[grid]), (), generator=rng))]

    def statistics(self) -> dict[str, float]:
        held = [self.stored["latent"][g, : int(n)].square().mean() for g, n in enumerate(self.count.tolist()) if n]
        rms = float(torch.stack(held).mean().sqrt()) if held else 0.0
        return {"bank_fill": float(self.count.sum()) / (self.spec.grids * self.spec.per_grid), "bank_rms": rms}

    def state_dict(self) -> dict[str, Any]:
        return {**self.stored, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.stored = {kind: state[kind] for kind in self.stored}


def erft_loss(
    model: Score,
    x: Float[Tensor, "B F C H W"],
    text: Tensor,
    context: Float[Tensor, "B K C H W"],
    sigma: Float[Tensor, " B"],
    *,
    view: TeacherView,
    bank: ErrorBank,
    step: int,
    rng: torch.Generator,
) -> Float[Tensor, ""]:
    """Flow matching whose input carries old mistakes and whose target does not (sec. 3.4; SVI, train_svi.py)."""
    noise = gaussian(x.shape, rng)
    spec, dirty = bank.spec, torch.rand(len(x), 4, generator=rng)
    clean = dirty[:, 0] < spec.clean if step >= spec.warmup else torch.ones(len(x), dtype=torch.bool)
    bad_x, bad_noise, bad_context = x.clone(), noise.clone(), context.clone()
    for i in (~clean).nonzero().flatten().tolist():
        level = float(sigma[i])
        if dirty[i, 1] < spec.latent and (error := bank.draw("latent", rng, level)) is not None:
            bad_x[i] += error
        if dirty[i, 2] < spec.noise and (error := bank.draw("noise", rng, level)) is not None:
            bad_noise[i] += error
        if dirty[i, 3] < spec.context and (error := bank.draw("latent", rng)) is not None:
            add_to_context(bad_context[i], error, view, spec.segments)
    target = bad_noise - x  # undoes the latent mistake, not the one in the noise
    velocity = view.velocity(model, add_noise(bad_x, bad_noise, sigma), sigma, text, bad_context)
    wrong = (velocity - target).detach()
    enter = ~clean | (torch.rand(len(x), generator=rng) < spec.clean_update) | (step < spec.warmup)
    for i in enter.nonzero().flatten().tolist():
        level = float(sigma[i])
        bank.add(level, -level * wrong[i], (1 - level) * wrong[i])
    return (velocity - target).square().mean()


def add_to_context(context: Float[Tensor, "K C H W"], error: Float[Tensor, "F C H W"], view: TeacherView, segments: str) -> None:
    """Adds the last frames of a mistake to the chosen segments of one context, in place."""
    skip = {"all": 0, "slow_fast": view.sink, "fast": len(context) - view.fast}[segments] if view.context == "sparse" else 0
    skip = max(skip, len(context) - len(error), 0)
    if skip < len(context):
        context[skip:] += error[skip - len(context) :]
