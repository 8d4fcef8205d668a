"""What makes one update of weights: gradients of the whole batch, clipped, scheduled, stepped. zero.py does it by DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .muon import Muon
from .ranks import ranks


@dataclass(frozen=True)
class EngineSpec:
    """How a step is spread over time and machines. It changes results by rounding alone, so no stage depends on it."""

    use: Literal["auto", "torch", "deepspeed"]  # auto: DeepSpeed where there are several ranks
    zero: Literal[0, 1, 2, 3]  # what DeepSpeed splits over the ranks: nothing, moments, and gradients, and weights
    offload: Literal["none", "optimizer"]  # moments and master weights in the CPU's memory, where they are also updated
    micro_batch: int | None  # samples that a rank computes at once; null: its whole share of the batch

    def __post_init__(self) -> None:
        if self.use == "torch" and (self.zero or self.offload != "none"):
            stated = f"use is torch, zero {self.zero}, offload {self.offload}"
            raise ValueError(f"{stated}; only DeepSpeed splits and offloads: use zero 0 and offload none, or auto or deepspeed")
        if self.offload != "none" and not self.zero:
            raise ValueError(f"offload is {self.offload} and zero 0; DeepSpeed offloads what it splits: use zero 1, 2 or 3")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; use 1 or more, or null for a rank's whole share")

    @property
    def is_deepspeed(self) -> bool:
        return self.use == "deepspeed" or (self.use == "auto" and ranks() > 1)

    def groups(self, batch: int) -> int:
        """In how many groups each rank takes its share of a batch; a batch that can't be split so is refused."""
        share, rest = divmod(batch, ranks())
        if rest:
            fit = [n for n in range(1, batch + 1) if batch % n == 0]
            up = -batch % ranks() + batch
            raise ValueError(f"batch is {batch}, which {ranks()} ranks can't share evenly; use CF_RANKS of {fit}, or a batch of {up}")
        micro = self.micro_batch or share
        if share % micro:
            fit = [n for n in range(1, share + 1) if share % n == 0]
            stated = f"engine.micro_batch is {micro}, but of a batch of {batch} each of {ranks()} ranks takes {share} samples"
            raise ValueError(f"{stated}, which are no whole groups of it; use a micro_batch of {fit}, or null")
        return share // micro


PLAIN = EngineSpec("torch", 0, "none", None)


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


def mean_gradients(model: nn.Module) -> None:
    """Over the ranks, whose shares of the batch are equal."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, ranks())


class Optimizer:
    """Accumulate, clip, schedule, step. `steps` is the number of updates that the schedule is stretched over."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int) -> None:
        self.model, self.spec, self.steps, self.done = model, spec, steps, 0
        matrices = [p for n, p in model.named_parameters() if spec.muon_lr and ".blocks." in n and p.ndim == 2 and p.requires_grad]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
        betas = (spec.beta1, spec.beta2)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if rest:  # of a LoRA in the blocks, Muon has everything
            self.parts.append((torch.optim.AdamW(rest, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay), spec.lr))
        if matrices:
            self.parts.append((Muon(matrices, lr=spec.muon_lr, weight_decay=spec.muon_decay), spec.muon_lr))

    @property
    def weights(self) -> Any:
        """The model's, for a checkpoint: whole, whatever is split over the ranks."""
        return self.model

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a group's share of the loss."""
        loss.backward()

    def step(self) -> float:
        """Uses the gradients that are there, then forgets them. Returns their norm before clipping.

        Gradients that are not finite leave the weights and the optimiser's own state as they were.
        """
        mean_gradients(self.model)
        norm = self.update()
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        return norm

    def update(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        self.schedule()
        if norm.isfinite():
            for optimizer, _ in self.parts:
                optimizer.step()
        return float(norm)

    def schedule(self) -> None:
        factor = self.factor()
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor

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
