"""The training loop every stage shares: optimisers, averaged weights, checkpoints; stopped and resumed = never stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cf_model.model import checkpoint


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW for everything; with `muon_lr` above 0, Muon for the matrices of the transformer's blocks."""

    lr: float
    muon_lr: float
    beta1: float
    beta2: float
    weight_decay: float  # of AdamW
    muon_decay: float  # of Muon, whose steps are far larger
    clip: float  # of the gradient's norm
    warmup: int  # steps from 0 to lr
    decay: float  # share of the steps, at the end, in which lr falls to a fiftieth; 0 keeps it

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.muon_lr < 0 or self.clip <= 0:
            raise ValueError(f"lr is {self.lr}, muon_lr {self.muon_lr} and clip {self.clip}; lr and clip are above 0, muon_lr is not below")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.decay <= 1):
            raise ValueError(f"beta1 is {self.beta1}, beta2 {self.beta2}, decay {self.decay}; use values in 0..1, the betas below 1")


def at_least(lowest: float, **values: float) -> None:
    for name, value in values.items():
        if value < lowest:
            raise ValueError(f"{name} is {value}; use {lowest} or more")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Optimizer:
    """Clip, schedule, step. `steps` is the number of updates that the schedule is stretched over."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int) -> None:
        self.model, self.spec, self.steps, self.done = model, spec, steps, 0
        matrices = [p for n, p in model.named_parameters() if spec.muon_lr and ".blocks." in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        betas = (spec.beta1, spec.beta2)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay), spec.lr)
        ]
        if matrices:
            self.parts.append((torch.optim.Muon(matrices, lr=spec.muon_lr, weight_decay=spec.muon_decay), spec.muon_lr))

    def step(self) -> float:
        """Uses the gradients that are there, then forgets them. Returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        factor = self.factor()
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        return float(norm)

    def factor(self) -> float:
        rise = min(1.0, (self.done + 1) / self.spec.warmup) if self.spec.warmup else 1.0
        left = 1 - self.done / self.steps
        fall = min(1.0, max(0.02, left / self.spec.decay)) if self.spec.decay else 1.0
        return rise * fall

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "parts": [optimizer.state_dict() for optimizer, _ in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        for (optimizer, _), saved in zip(self.parts, state["parts"], strict=True):
            optimizer.load_state_dict(saved)


M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """Exponential moving average of a model's weights: what is generated with; rollouts use the raw weights."""

    def __init__(self, model: M, decay: float, start: int = 0) -> None:
        self.source, self.decay, self.start, self.done = model, decay, start, 0
        self.model: M = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        # Choice: a rising decay in the first updates, so that a short run's average is not its starting point.
        decay = min(self.decay, (1 + self.done) / (10 + self.done)) if self.done >= self.start else 0.0
        for mean, raw in zip(self.model.parameters(), self.source.parameters(), strict=True):
            mean.lerp_(raw, 1 - decay)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.model.load_state_dict(state["model"])


class Random:
    """A seeded stream of numbers that a checkpoint can hold."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """Uniform in low..high, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.rng).tolist()

    def coin(self, chance: float) -> bool:
        return float(torch.rand((), generator=self.rng)) < chance

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])


class Clips(Protocol):
    """The training clips, already encoded (cf_model/data/latents.py)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""

    def rows(self, split: Literal["train", "heldout"], at_least: int = 1) -> list[int]:
        """Clips of a split with at least so many latent frames; refuses an empty answer."""

    def frames(self, row: int) -> int: ...

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        """[B, F, C, H, W] float32."""

    def text(self, rows: list[int]) -> Tensor:
        """[B, T, E] float32."""

    @property
    def empty_text(self) -> Tensor:
        """[T, E]: no prompt at all."""


class Log(Protocol):
    """What a loop tells the world; tasks/tracking.py has the one implementation."""

    work: Path

    def log(self, step: int, **values: float) -> None: ...

    def resumed(self, step: int) -> None: ...

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Any: ...


def fit(step: Callable[[int], Mapping[str, float]], *, steps: int, state: Mapping[str, Stateful], log: Log, save_every: int) -> None:
    """Runs `step` for 0 .. steps - 1, from the newest usable checkpoint in `log.work` on.

    `state` names everything that a step changes; all of it is in each checkpoint. A value of `step` that is not finite
    stops the run with the step's number.
    """
    first = checkpoint.restore(log.work, state)
    if first:
        log.resumed(first)
    bar = log.progress(steps, "step", first)
    for number in range(first, steps):
        values = step(number)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"step {number + 1}: {bad[0]} is {values[bad[0]]}; lower the learning rate, the last checkpoint is intact")
        log.log(number + 1, **values)
        bar.update(1, **dict(list(values.items())[:2]))
        if (number + 1) % save_every == 0 and number + 1 < steps:
            checkpoint.save(log.work, number + 1, state)
    bar.close()


def batches(rows: Iterable[int], count: int, rng: Random) -> list[int]:
    """`count` of the rows, drawn with replacement."""
    rows = list(rows)
    return [rows[i] for i in rng.integers(0, len(rows) - 1, count)]


def drop_prompts(text: Float[Tensor, "B T E"], empty: Float[Tensor, "T E"], share: float, rng: Random) -> Float[Tensor, "B T E"]:
    """The empty prompt in place of a share of the prompts: what guidance needs."""
    keep = torch.rand(len(text), generator=rng.rng) >= share
    return torch.where(keep[:, None, None], text, empty)
