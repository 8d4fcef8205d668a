"""Settings of an update of weights, and the optimiser of plain torch: average gradients, clip, schedule, step. zero.py uses DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cf_model.model.precision import forget_copies

from .muon import Muon
from .ranks import count_ranks


def require_at_least(lowest: float, **values: float) -> None:
    """Raise ValueError for a setting below `lowest`, by its name."""
    for name, value in values.items():
        if value < lowest:
            raise ValueError(f"{name} is {value}; use {lowest} or more")


@dataclass(frozen=True)
class EngineSpec:
    """How a step is spread over time and machines. Changes results by rounding alone, so no stage depends on these settings in dvc.yaml."""

    use: Literal["auto", "torch", "deepspeed"]  # auto: DeepSpeed where there are several ranks
    zero: Literal[0, 1, 2, 3]  # what DeepSpeed splits over the ranks: nothing, moments, and gradients, and weights
    offload: Literal["none", "optimizer"]  # moments and master weights in the CPU's memory, where they are also updated
    micro_batch: int | None  # samples that a rank computes at once; null: its whole share of the batch

    def __post_init__(self) -> None:
        if self.use == "torch" and (self.zero or self.offload != "none"):
            problem = f"use is torch, zero {self.zero}, offload {self.offload}"
            raise ValueError(f"{problem}; only DeepSpeed splits and offloads: use zero 0 and offload none, or auto or deepspeed")
        if self.offload != "none" and not self.zero:
            raise ValueError(f"offload is {self.offload} and zero 0; DeepSpeed offloads what it splits: use zero 1, 2 or 3")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; use 1 or more, or null for a rank's whole share")

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed makes the updates."""
        return self.use == "deepspeed" or (self.use == "auto" and count_ranks() > 1)

    def count_groups(self, batch: int) -> int:
        """Return the number of groups in which each rank takes its share of a batch. Raises ValueError for a batch without such a split."""
        # The ranks' shares must be equal, because their gradients are averaged without weights.
        share, rest = divmod(batch, count_ranks())
        if rest:
            fit = [n for n in range(1, batch + 1) if batch % n == 0]
            up = -batch % count_ranks() + batch
            raise ValueError(f"batch is {batch}, which {count_ranks()} ranks can't share evenly; use CF_RANKS of {fit}, or a batch of {up}")
        # So must the groups' sizes, because `draw_rows` and the random numbers are cut into equal parts.
        micro = self.micro_batch or share
        if share % micro:
            fit = [n for n in range(1, share + 1) if share % n == 0]
            problem = f"engine.micro_batch is {micro}, but of a batch of {batch} each of {count_ranks()} ranks takes {share} samples"
            raise ValueError(f"{problem}, which are no whole groups of it; use a micro_batch of {fit}, or null")
        return share // micro


PLAIN = EngineSpec("torch", 0, "none", None)  # one process, plain torch, a batch at once


@dataclass(frozen=True)
class OptimizerSpec:
    """Settings of AdamW, which trains everything; with `muon_lr` above 0, Muon trains the matrices of the transformer's blocks."""

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


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the ranks, whose shares of the batch are equal."""
    if count_ranks() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # All reductions are started before any is waited for, so that they overlap.
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, count_ranks())


class Optimizer:
    """Optimiser of one network by plain torch: accumulates, clips, schedules, steps. The schedule is stretched over `steps` updates."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int) -> None:
        self.model, self.spec, self.steps, self.done = model, spec, steps, 0
        # Muon orthogonalises an update, which has a meaning for the blocks' matrices only; norms, biases and embeddings learn by AdamW.
        matrices = [p for n, p in model.named_parameters() if spec.muon_lr and ".blocks." in n and p.ndim == 2 and p.requires_grad]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
        betas = (spec.beta1, spec.beta2)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if rest:  # empty for a LoRA in the blocks: Muon trains all of its matrices
            self.parts.append((torch.optim.AdamW(rest, lr=spec.lr, betas=betas, weight_decay=spec.weight_decay), spec.lr))
        if matrices:
            self.parts.append((Muon(matrices, lr=spec.muon_lr, weight_decay=spec.muon_decay), spec.muon_lr))

    @property
    def weights(self) -> Any:
        """What saves and loads the model's weights for a checkpoint: whole tensors, whatever the ranks have split."""
        return self.model

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a group's share of the batch's loss to those that are there."""
        loss.backward()

    def step(self) -> Tensor:
        """Update the weights by the accumulated gradients, and clear these. Return the gradients' norm before clipping.

        Gradients that are not finite leave the weights and the optimiser's own state as they were.
        """
        average_gradients(self.model)
        norm = self.update()
        self.model.zero_grad(set_to_none=True)
        forget_copies(self.model)
        self.done += 1
        return norm

    def update(self) -> Tensor:
        """Clip the averaged gradients, set the learning rates and step. Return the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        self.schedule()
        if norm.isfinite():  # the one value of an update for which a GPU is waited for
            for optimizer, _ in self.parts:
                optimizer.step()
        return norm

    def schedule(self) -> None:
        """Set each optimiser's learning rate for the update that comes next."""
        factor = self.factor()
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor

    def factor(self) -> float:
        """Return the learning rate's factor: rising over `warmup` updates, falling to a fiftieth over the last `decay` of all."""
        # Warm-up: linear, so the first update already has a rate above 0.
        rise = min(1.0, (self.done + 1) / self.spec.warmup) if self.spec.warmup else 1.0
        # Decay: linear over the last `decay` of the updates, down to a fiftieth.
        left = 1 - self.done / self.steps
        fall = min(1.0, max(0.02, left / self.spec.decay)) if self.spec.decay else 1.0
        return rise * fall

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "parts": [optimizer.state_dict() for optimizer, _ in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        for (optimizer, _), saved in zip(self.parts, state["parts"], strict=True):
            optimizer.load_state_dict(saved)
