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

from cf_model.model.flow import Flow, add_noise, draw_gaussian, own_rows
from cf_model.model.view import Score, TeacherView
from cf_model.train.trainer.ranks import gather_by_row


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

    def collect(self, *parts: BatchResiduals) -> None:
        """Takes the mistakes of one batch: of all ranks, and of all its parts where it was gone through in several.

        In the order of the batch's rows, whoever had them: every rank has the same bank afterwards.
        """
        levels, wrong = parts[0].levels, {row: found for part in parts for row, found in part.wrong.items()}
        for level, one in zip(levels.values(), gather_by_row(wrong, list(levels), parts[0].like), strict=True):
            self.add(level, -level * one, (1 - level) * one)

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


@dataclass(frozen=True)
class BatchResiduals:
    """What the bank is to learn of one batch: which of its rows, and what each process found of its own."""

    levels: dict[int, float]  # row of the whole batch -> its noise level, in the batch's order
    wrong: dict[int, Tensor]  # of the rows that are here: predicted minus wanted velocity
    like: Tensor  # of the size of one


def compute_erft_loss(
    model: Score,
    x: Float[Tensor, "B F C H W"],
    text: Float[Tensor, "B T E"],
    context: Float[Tensor, "B K C H W"],
    levels: Float[Tensor, " whole"],
    *,
    view: TeacherView,
    bank: ErrorBank,
    flow: Flow,
    weight: Literal["uniform", "bell"],
    step: int,
    rng: torch.Generator,
) -> tuple[Float[Tensor, ""], BatchResiduals]:
    """Flow matching whose input carries old mistakes and whose target does not, w(σ) |v - v*|² (sec. 3.4; SVI, train_svi.py).

    `levels` are those of the whole batch, of which x, text and context are this process's rows: which mistakes are added
    where is drawn for all of them, the same in every process. The bank stays as it is; it takes what is returned.
    """
    noise = draw_gaussian(x.shape, rng)
    spec, sigma, dirty = bank.spec, own_rows(levels, rng).to(x), torch.rand(len(levels), 4, generator=rng)
    clean = dirty[:, 0] < spec.clean if step >= spec.warmup else torch.ones(len(levels), dtype=torch.bool)
    here = {row: i for i, row in enumerate(own_rows(torch.arange(len(levels)), rng).tolist())}
    bad_x, bad_noise, bad_context = x.clone(), noise.clone(), context.clone()
    for row in (~clean).nonzero().flatten().tolist():
        latent, of_noise, of_context = _draw_errors(bank, dirty[row, 1:], float(levels[row]), rng)
        if (i := here.get(row)) is None:
            continue
        if latent is not None:
            bad_x[i] += latent.to(x)
        if of_noise is not None:
            bad_noise[i] += of_noise.to(x)
        if of_context is not None:
            _add_to_context(bad_context[i], of_context.to(x), view, spec.segments)
    target = bad_noise - x  # undoes the latent mistake, not the one in the noise
    velocity = view.velocity(model, add_noise(bad_x, bad_noise, sigma), sigma, text, bad_context)
    wrong = (velocity - target).detach()
    enter = ~clean | (torch.rand(len(levels), generator=rng) < spec.clean_update) | (step < spec.warmup)
    entering = {row: float(levels[row]) for row in enter.nonzero().flatten().tolist()}
    found = BatchResiduals(entering, {row: wrong[here[row]] for row in entering if row in here}, wrong[0])
    error = (velocity - target).square()
    return (error.mean(dim=(1, 2, 3, 4)) * flow.loss_weight(sigma) if weight == "bell" else error).mean(), found


def _draw_errors(bank: ErrorBank, chances: Tensor, level: float, rng: torch.Generator) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mistakes that one sample's target, its noise and its context get; the context's may be of any level."""
    spec = bank.spec
    latent = bank.draw("latent", rng, level) if chances[0] < spec.latent else None
    noise = bank.draw("noise", rng, level) if chances[1] < spec.noise else None
    return latent, noise, bank.draw("latent", rng) if chances[2] < spec.context else None


def _add_to_context(context: Float[Tensor, "K C H W"], error: Float[Tensor, "F C H W"], view: TeacherView, segments: str) -> None:
    """Adds the last frames of a mistake to the chosen segments of one context, in place."""
    skip = {"all": 0, "slow_fast": view.sink, "fast": len(context) - view.fast}[segments] if view.context == "sparse" else 0
    skip = max(skip, len(context) - len(error), 0)
    if skip < len(context):
        context[skip:] += error[skip - len(context) :]
