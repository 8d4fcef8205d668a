"""How a training stage's work is divided among ranks and groups of a batch, and which settings would make it fit a device's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cf_model.train.trainer.engine import EngineSpec

from .need import StageNeed

GIB = 2**30


def list_micro_batches(batch: int, ranks: int) -> list[int]:
    """List the numbers of samples that a rank may compute at once: its share of the batch in equal parts, largest first."""
    share = max(1, batch // ranks)
    return [share // n for n in range(1, share + 1) if share % n == 0]


@dataclass(frozen=True)
class WorkSplit:
    """How a stage is divided: samples that each rank computes at once, and what DeepSpeed splits among the ranks."""

    at_once: int
    zero: int
    ranks: int
    offload: bool = False  # of the optimiser, from a GPU into the machine's memory

    @classmethod
    def from_engine(cls, engine: EngineSpec, batch: int, ranks: int, *, gpu: bool = False) -> WorkSplit:
        zero = engine.zero if engine.use == "deepspeed" or (engine.use == "auto" and ranks > 1) else 0
        return cls(engine.micro_batch or max(1, batch // ranks), zero, ranks, gpu and zero > 0 and engine.offload == "optimizer")

    def peak(self, one: StageNeed, at_once: int | None = None) -> float:
        return one.peak(self.at_once if at_once is None else at_once, self.zero, self.ranks, offload=self.offload)


def suggest_remedy(one: StageNeed, leaner: StageNeed | None, free: float, split: WorkSplit) -> str:
    """Name the settings that would make a stage fit, or what it would take."""
    ways = [f"engine.micro_batch: {n}" for n in list_micro_batches(one.batch, split.ranks) if split.peak(one, n) <= free][:1]
    if leaner and split.peak(leaner) <= free:
        ways.append("compute.checkpointing: true")
    if split.zero and not split.offload and replace(split, offload=True).peak(one) <= free:
        ways.append("engine.offload: optimizer")
    if ways:
        return f"use {', or '.join(ways)}"
    if leaner and split.peak(leaner, 1) <= free:
        return "use compute.checkpointing: true and engine.micro_batch: 1"
    for ranks in (2, 4, 8, 16, 32, 64):
        for zero in (2, 3):
            if ranks >= split.ranks and one.peak(1, zero, ranks) <= free:
                return f"{ranks} such ranks with engine.zero: {zero} and engine.micro_batch: 1 would hold it"
    smallest = f"one sample alone takes {format_number(one.peak(1) / GIB)}"
    return f"{smallest}: use a larger device, or a smaller model, video or memory (`cf plan` shows what takes most)"


def format_number(value: float) -> str:
    """Return a number with three digits and, above 0.0001, without exponent."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value >= 1e-4 else f"{value:.0e}"
