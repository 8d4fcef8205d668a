"""What makes one update of weights: gradients from every rank, clipped, scheduled, stepped.

Ranks are processes that share one batch (data parallelism). Every one holds all weights and draws the same random numbers,
keeps its rows of them, and averages its gradients with the others', so the result is one process's up to rounding. Nothing
but the environment says how many there are (tasks/ranks.py); with one, nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cf_model.model.flow import Shared


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Of the ranks, the one that writes."""
    return rank() == 0


def stream(seed: int, device: torch.device | None = None) -> Shared:
    """The random numbers of a run: the same on every rank, each with its own rows of what is drawn for a batch."""
    made = Shared(device or "cpu", rank(), ranks())
    made.manual_seed(seed)
    return made


T = TypeVar("T")


def mine(rows: Sequence[T]) -> list[T]:
    """This rank's rows of the batch."""
    if len(rows) % ranks():
        fit = [n for n in range(1, len(rows) + 1) if len(rows) % n == 0]
        up = -len(rows) % ranks() + len(rows)
        raise ValueError(f"batch is {len(rows)}, which {ranks()} ranks can't share evenly; use CF_RANKS of {fit}, or a batch of {up}")
    each = len(rows) // ranks()
    return list(rows[rank() * each : (rank() + 1) * each])


def mean_gradients(model: nn.Module) -> None:
    """Over the ranks, whose shares of the batch are equal."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, ranks())


def from_all(mine: Mapping[int, Tensor], rows: Sequence[int], like: Tensor) -> Tensor:
    """What the ranks found of these rows of the batch, in their order; each row is one rank's, each the size of `like`."""
    found = like.new_zeros(len(rows), *like.shape)
    for place, row in enumerate(rows):
        if row in mine:
            found[place] = mine[row]
    if ranks() > 1 and rows:
        dist.all_reduce(found)  # one of the terms is not 0, so the sum is exact
    return found


def mean_values(values: Mapping[str, float], asked: bool) -> tuple[dict[str, float], bool]:
    """What a step says of itself, over the ranks; and whether any of them was asked to stop."""
    if ranks() == 1:
        return dict(values), asked
    told = torch.tensor([float(asked), *values.values()], dtype=torch.float64, device=_device())
    dist.all_reduce(told)
    any_asked, *sums = told.tolist()
    return {name: total / ranks() for name, total in zip(values, sums, strict=True)}, any_asked > 0


def agree_on_start(step: int) -> int:
    """All ranks go on from the same checkpoint, or none does."""
    if ranks() == 1:
        return step
    found = [torch.zeros((), dtype=torch.long, device=_device()) for _ in range(ranks())]
    dist.all_gather(found, torch.tensor(step, device=_device()))
    steps = [int(one) for one in found]
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks found checkpoints of steps {steps}; put the working folder where all of them read the same files")
    return step


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


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


class Optimizer:
    """Clip, schedule, step. `steps` is the number of updates that the schedule is stretched over."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int) -> None:
        self.model, self.spec, self.steps, self.done = model, spec, steps, 0
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in learning if spec.muon_lr and ".blocks." in name and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in learning if id(p) not in chosen]
        betas = (spec.beta1, spec.beta2)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay), spec.lr)
        ]
        if matrices:
            self.parts.append((torch.optim.Muon(matrices, lr=spec.muon_lr, weight_decay=spec.muon_decay), spec.muon_lr))

    def step(self) -> float:
        """Uses the gradients that are there, then forgets them. Returns their norm before clipping.

        Gradients that are not finite leave the weights and the optimiser's own state as they were.
        """
        mean_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        factor = self.factor()
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            if norm.isfinite():
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
