"""Error-recycling fine-tuning (ERFT, sec. 3.4): the teacher's input carries its own past errors, and the teacher recovers from them.

X̃_{1:k} = X_{1:k} + I · e_drift, where e_drift is drawn from a bank of past residuals and I is a Bernoulli indicator. As in SVI, the source
of the method, errors are also added to the target and to its noise.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from cf_model.model.flow import BatchGenerator, Flow, Noise, add_noise, draw_gaussian, own_rows
from cf_model.model.view import Score, TeacherView
from cf_model.train.trainer.ranks import gather_by_row


@dataclass(frozen=True)
class ErrorSpec:
    """How often past errors are added to the input, and how many the bank stores."""

    context: float  # chance that the context gets an error: E[I] of sec. 3.4
    latent: float  # chance that the target does
    noise: float  # chance that the target's noise does
    clean: float  # chance that a sample gets no error at all
    clean_update: float  # chance that a clean sample's residual enters the bank
    segments: Literal["fast", "slow_fast", "all"]  # frames of the context that can get an error
    grids: int  # intervals of the noise level, each with errors of its own
    per_grid: int  # errors stored of each interval
    dtype: Literal["float32", "bfloat16"]  # of the stored errors
    bytes: int  # that a full bank may take
    warmup: int  # steps in which errors are only collected

    def __post_init__(self) -> None:
        # All five are chances.
        for name in ("context", "latent", "noise", "clean", "clean_update"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it is a chance; use a value in 0..1")
        if self.grids < 1 or self.per_grid < 1:
            raise ValueError(f"grids is {self.grids} and per_grid {self.per_grid}; the bank stores at least one error")

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a bank of errors of `shape` that takes more than `bytes`.

        Choice: a bank that is too large is refused, not shrunk: how many errors it stores is part of the method.
        """
        layer = 2 * math.prod(shape) * getattr(torch, self.dtype).itemsize * self.grids  # two kinds, one error in every interval
        full, fits = layer * self.per_grid, self.bytes // layer
        if full > self.bytes:
            problem = f"errors.bytes is {self.bytes}, but {self.per_grid} errors of {list(shape)} on {self.grids} levels take {full}"
            raise ValueError(f"{problem}; use {f'errors.per_grid: {fits}, or ' if fits else ''}errors.bytes: {full}")


class ErrorBank:
    """Past errors of the teacher by noise level: its estimate of x_0 minus x_0 (`latent`), and its estimate of ε minus ε (`noise`).

    In a full interval a new error replaces the nearest stored one, so the bank stays varied. The bank is part of the checkpoint, and
    is written beside the teacher.
    """

    def __init__(self, spec: ErrorSpec, shape: tuple[int, ...]) -> None:
        spec.check_fits(shape)
        self.spec = spec
        # Allocated in full from the beginning, so that a bank that grows never ends a run days later.
        size, dtype = (spec.grids, spec.per_grid, *shape), getattr(torch, spec.dtype)  # [grids, per_grid, F, C, H, W]
        self.stored = {"latent": torch.zeros(size, dtype=dtype), "noise": torch.zeros(size, dtype=dtype)}
        self.count = torch.zeros(spec.grids, dtype=torch.long)

    def grid(self, sigma: float) -> int:
        """Return the interval of a noise level."""
        return min(self.spec.grids - 1, int(sigma * self.spec.grids))

    def add(self, sigma: float, latent: Tensor, noise: Tensor) -> None:
        """Store one sample's two errors, each [F, C, H, W], in the interval of its noise level."""
        latent, noise = latent.to(self.stored["latent"]), noise.to(self.stored["noise"])
        if not (latent.isfinite().all() and noise.isfinite().all()):
            return  # a bad step (loop.fit) changes no weights, and no bank
        grid = self.grid(sigma)
        slot = int(self.count[grid])
        # In a full interval the nearest stored error, by the L2 distance of the errors of x_0, makes room.
        if slot == self.spec.per_grid:
            slot = int((self.stored["latent"][grid] - latent).flatten(1).norm(dim=1).argmin())
        else:
            self.count[grid] += 1
        self.stored["latent"][grid, slot], self.stored["noise"][grid, slot] = latent, noise

    def collect(self, *parts: BatchResiduals) -> None:
        """Store the errors of one batch, whose groups are `parts`: in the order of its rows, so that every rank has the same bank."""
        levels, residuals = parts[0].levels, {row: residual for part in parts for row, residual in part.residuals.items()}
        for sigma, residual in zip(levels.values(), gather_by_row(residuals, list(levels), parts[0].like), strict=True):
            # x_0 = x_σ - σ v and ε = x_σ + (1 - σ) v turn the residual v̂ - v* into the errors of x_0 and ε.
            self.add(sigma, -sigma * residual, (1 - sigma) * residual)

    def draw(self, kind: Literal["latent", "noise"], rng: torch.Generator, sigma: float | None = None) -> Tensor | None:
        """Draw an error of the noise level `sigma`'s interval, or of any interval: [F, C, H, W]. None while there is none."""
        grids = self.count.nonzero().flatten().tolist() if sigma is None else [self.grid(sigma)]
        filled = [g for g in grids if self.count[g]]
        if not filled:
            return None
        # First an interval, then an error in it: all intervals that have errors are equally likely, however many they have.
        grid = filled[int(torch.randint(len(filled), (), generator=rng))]
        return self.stored[kind][grid, int(torch.randint(int(self.count[grid]), (), generator=rng))].float()

    def statistics(self) -> dict[str, float]:
        """Return the filled share of the bank, and the root mean square of its errors of x_0."""
        squares = [self.stored["latent"][g, : int(n)].float().square().mean() for g, n in enumerate(self.count.tolist()) if n]
        rms = float(torch.stack(squares).mean().sqrt()) if squares else 0.0
        return {"bank_fill": float(self.count.sum()) / (self.spec.grids * self.spec.per_grid), "bank_rms": rms}

    def levels(self) -> list[dict[str, Any]]:
        """Return for every interval of the noise level its number of errors, and their mean and root mean square."""
        rows: list[dict[str, Any]] = []
        for grid, count in enumerate(self.count.tolist()):
            row: dict[str, Any] = {"from": grid / self.spec.grids, "to": (grid + 1) / self.spec.grids, "count": count}
            for kind, stored in self.stored.items() if count else ():
                errors = stored[grid, :count].float()
                row[kind] = {"mean": float(errors.mean()), "rms": float(errors.square().mean().sqrt())}
            rows.append(row)
        return rows

    def save(self, folder: Path) -> None:
        """Write errors.safetensors, the errors interval after interval as `count` says, and errors.json, what `levels` returns."""
        save_file(self.state_dict(), folder / "errors.safetensors")
        (folder / "errors.json").write_text(json.dumps({"dtype": self.spec.dtype, "levels": self.levels()}, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the stored errors without the empty places, so that a bank that is not full makes a smaller checkpoint."""
        filled = torch.arange(self.spec.per_grid) < self.count[:, None]
        return {**{kind: stored[filled] for kind, stored in self.stored.items()}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        filled = torch.arange(self.spec.per_grid) < self.count[:, None]
        for kind, stored in self.stored.items():
            stored[filled] = state[kind]


@dataclass(frozen=True)
class BatchResiduals:
    """The residuals v̂ - v* of one batch that enter the bank: which rows do, and the tensors of this process's rows."""

    levels: dict[int, float]  # row of the whole batch -> its noise level, in the batch's order
    residuals: dict[int, Tensor]  # row, of this process -> [F, C, H, W]
    like: Tensor  # [F, C, H, W]: shape and device of a residual


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
    filled: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, ""], BatchResiduals]:
    """Compute the flow matching loss w(σ) |v - v*|² of an input that carries past errors (sec. 3.4; SVI, train_svi.py).

    `levels` are the noise levels of the whole batch, of which x, text and context are this process's rows; all processes draw the same
    errors for all rows. `filled` says which context frames a row has (`HeldFrames`).
    The bank does not change here: hand the returned residuals to `ErrorBank.collect`.
    """
    noise = draw_gaussian(x.shape, rng)
    # Four chances a row: to stay clean, and the indicators I of target, noise and context; [batch, 4].
    spec, sigma, chances = bank.spec, own_rows(levels, rng).to(x), torch.rand(len(levels), 4, generator=rng)
    clean = chances[:, 0] < spec.clean if step >= spec.warmup else torch.ones(len(levels), dtype=torch.bool)
    place = {row: i for i, row in enumerate(_number_own_rows(len(levels), rng))}  # row of the batch -> row of x
    # X̃ = X + I · e, for the context and, as in SVI, for the target and its noise.
    bad_x, bad_noise, bad_context = x.clone(), noise.clone(), context.clone()
    for row in (~clean).nonzero().flatten().tolist():
        latent, of_noise, of_context = _draw_errors(bank, chances[row, 1:], float(levels[row]), rng)
        if (i := place.get(row)) is None:
            continue  # another process's row: drawn here too, so that the random numbers stay the same everywhere
        if latent is not None:
            bad_x[i] += latent.to(x)
        if of_noise is not None:
            bad_noise[i] += of_noise.to(x)
        if of_context is not None:
            _add_to_context(bad_context[i], of_context.to(x), view, spec.segments)
    # v*: from the perturbed noise to the clean x_0, so the model learns to undo the error of x_0 and keeps that of the noise.
    target = bad_noise - x
    # One pass over the perturbed context and the perturbed x_σ: [B, F, C, H, W].
    velocity = view.velocity(model, add_noise(bad_x, bad_noise, sigma), sigma, text, bad_context, filled=filled)
    residual = (velocity - target).detach()
    # Which rows enter the bank: those that carried errors, a share of the clean ones, and during the warm-up all.
    enter = ~clean | (torch.rand(len(levels), generator=rng) < spec.clean_update) | (step < spec.warmup)
    entering = {row: float(levels[row]) for row in enter.nonzero().flatten().tolist()}
    residuals = BatchResiduals(entering, {row: residual[place[row]] for row in entering if row in place}, residual[0])
    # The level's weight w(σ) multiplies each sample's mean.
    error = (velocity - target).square()
    return (error.mean(dim=(1, 2, 3, 4)) * flow.loss_weight(sigma) if weight == "bell" else error).mean(), residuals


def _number_own_rows(whole: int, rng: Noise) -> range:
    """Return the numbers of this process's rows in a batch of `whole` rows."""
    return range(rng.first, rng.first + len(rng.rows)) if isinstance(rng, BatchGenerator) else range(whole)


def _draw_errors(
    bank: ErrorBank, chances: Float[Tensor, " 3"], level: float, rng: torch.Generator
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Draw the errors of one sample's target, noise and context, each with its chance; the context's may be of any noise level."""
    spec = bank.spec
    latent = bank.draw("latent", rng, level) if chances[0] < spec.latent else None
    noise = bank.draw("noise", rng, level) if chances[1] < spec.noise else None
    return latent, noise, bank.draw("latent", rng) if chances[2] < spec.context else None


def _add_to_context(context: Float[Tensor, "K C H W"], error: Float[Tensor, "F C H W"], view: TeacherView, segments: str) -> None:
    """Add the last frames of an error to the chosen segments of one context, in place."""
    # Frames at the context's beginning that stay clean; a contiguous context has no segments. Early in a video the context is
    # shorter than sink and fast part together: then its first frames belong to both, and stay clean as the sink's.
    clean = {"all": 0, "slow_fast": view.sink, "fast": max(view.sink, len(context) - view.past_fast)}
    skip = clean[segments] if view.context in ("sparse", "memory") else 0
    # Choice: the error's last frames meet the context's last frames, as many as both have.
    skip = max(skip, len(context) - len(error), 0)
    if skip < len(context):
        context[skip:] += error[skip - len(context) :]
