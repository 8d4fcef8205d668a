"""Error-recycling fine-tuning (sec. 3.4): the teacher is shown its own past mistakes, and undoes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from cf_model.model.flow import Flow, add_noise, gaussian
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
    dtype: Literal["float32", "bfloat16"]  # that they are kept in
    bytes: int  # the bank may take, full
    warmup: int  # steps in which mistakes are only collected

    def __post_init__(self) -> None:
        for name in ("context", "latent", "noise", "clean", "clean_update"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it is a chance; use a value in 0..1")
        if self.grids < 1 or self.per_grid < 1:
            raise ValueError(f"grids is {self.grids} and per_grid {self.per_grid}; the bank holds at least one mistake")

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Choice: a bank that is too large is refused, not shrunk: how many mistakes it holds is part of the method."""
        one = 2 * math.prod(shape) * getattr(torch, self.dtype).itemsize * self.grids  # two kinds, of every level
        full, fits = one * self.per_grid, self.bytes // one
        if full > self.bytes:
            stated = f"errors.bytes is {self.bytes}, but {self.per_grid} mistakes of {list(shape)} on {self.grids} levels take {full}"
            raise ValueError(f"{stated}; use {f'errors.per_grid: {fits}, or ' if fits else ''}errors.bytes: {full}")


class ErrorBank:
    """Past mistakes of the teacher, by noise level: what it took for x_0, and for ε, minus the truth.

    A full level replaces the stored mistake that is nearest to the new one, so the bank stays varied. It is bounded,
    drawn from with a seeded generator, part of the checkpoint, and written beside the teacher.
    """

    def __init__(self, spec: ErrorSpec, shape: tuple[int, ...]) -> None:
        spec.check_fits(shape)
        self.spec = spec
        size, dtype = (spec.grids, spec.per_grid, *shape), getattr(torch, spec.dtype)
        self.stored = {"latent": torch.zeros(size, dtype=dtype), "noise": torch.zeros(size, dtype=dtype)}
        self.count = torch.zeros(spec.grids, dtype=torch.long)

    def grid(self, sigma: float) -> int:
        return min(self.spec.grids - 1, int(sigma * self.spec.grids))

    def add(self, sigma: float, latent: Tensor, noise: Tensor) -> None:
        latent, noise = latent.to(self.stored["latent"]), noise.to(self.stored["noise"])
        if not (latent.isfinite().all() and noise.isfinite().all()):
            return  # of a step that is left out (loop.fit)
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
        return self.stored[kind][grid, int(torch.randint(int(self.count[grid]), (), generator=rng))].float()

    def statistics(self) -> dict[str, float]:
        held = [self.stored["latent"][g, : int(n)].float().square().mean() for g, n in enumerate(self.count.tolist()) if n]
        rms = float(torch.stack(held).mean().sqrt()) if held else 0.0
        return {"bank_fill": float(self.count.sum()) / (self.spec.grids * self.spec.per_grid), "bank_rms": rms}

    def levels(self) -> list[dict[str, Any]]:
        """Of every noise level: how many mistakes, and the mean and rms of what they are made of."""
        rows: list[dict[str, Any]] = []
        for grid, count in enumerate(self.count.tolist()):
            row: dict[str, Any] = {"from": grid / self.spec.grids, "to": (grid + 1) / self.spec.grids, "count": count}
            for kind, stored in self.stored.items() if count else ():
                held = stored[grid, :count].float()
                row[kind] = {"mean": float(held.mean()), "rms": float(held.square().mean().sqrt())}
            rows.append(row)
        return rows

    def save(self, folder: Path) -> None:
        """errors.safetensors: the mistakes, level after level as `count` says; errors.json: `levels`."""
        save_file(self.state_dict(), folder / "errors.safetensors")
        (folder / "errors.json").write_text(json.dumps({"dtype": self.spec.dtype, "levels": self.levels()}, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Only what is held: a checkpoint of a bank that is not full is smaller than one that is."""
        there = torch.arange(self.spec.per_grid) < self.count[:, None]
        return {**{kind: stored[there] for kind, stored in self.stored.items()}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        there = torch.arange(self.spec.per_grid) < self.count[:, None]
        for kind, stored in self.stored.items():
            stored[there] = state[kind]


def erft_loss(
    model: Score,
    x: Float[Tensor, "B F C H W"],
    text: Tensor,
    context: Float[Tensor, "B K C H W"],
    sigma: Float[Tensor, " B"],
    *,
    view: TeacherView,
    bank: ErrorBank,
    flow: Flow,
    weight: Literal["uniform", "bell"],
    step: int,
    rng: torch.Generator,
) -> Float[Tensor, ""]:
    """Flow matching whose input carries old mistakes and whose target does not, w(σ) |v - v*|² (sec. 3.4; SVI, train_svi.py)."""
    noise = gaussian(x.shape, rng)
    spec, dirty = bank.spec, torch.rand(len(x), 4, generator=rng)
    clean = dirty[:, 0] < spec.clean if step >= spec.warmup else torch.ones(len(x), dtype=torch.bool)
    bad_x, bad_noise, bad_context = x.clone(), noise.clone(), context.clone()
    for i in (~clean).nonzero().flatten().tolist():
        level = float(sigma[i])
        if dirty[i, 1] < spec.latent and (error := bank.draw("latent", rng, level)) is not None:
            bad_x[i] += error.to(x)
        if dirty[i, 2] < spec.noise and (error := bank.draw("noise", rng, level)) is not None:
            bad_noise[i] += error.to(x)
        if dirty[i, 3] < spec.context and (error := bank.draw("latent", rng)) is not None:
            add_to_context(bad_context[i], error.to(x), view, spec.segments)
    target = bad_noise - x  # undoes the latent mistake, not the one in the noise
    velocity = view.velocity(model, add_noise(bad_x, bad_noise, sigma), sigma, text, bad_context)
    wrong = (velocity - target).detach()
    enter = ~clean | (torch.rand(len(x), generator=rng) < spec.clean_update) | (step < spec.warmup)
    for i in enter.nonzero().flatten().tolist():
        level = float(sigma[i])
        bank.add(level, -level * wrong[i], (1 - level) * wrong[i])
    error = (velocity - target).square()
    return (error.mean(dim=(1, 2, 3, 4)) * flow.weight(sigma) if weight == "bell" else error).mean()


def add_to_context(context: Float[Tensor, "K C H W"], error: Float[Tensor, "F C H W"], view: TeacherView, segments: str) -> None:
    """Adds the last frames of a mistake to the chosen segments of one context, in place."""
    skip = {"all": 0, "slow_fast": view.sink, "fast": len(context) - view.fast}[segments] if view.context == "sparse" else 0
    skip = max(skip, len(context) - len(error), 0)
    if skip < len(context):
        context[skip:] += error[skip - len(context) :]
