"""How a training stage's work is divided among ranks and groups of a batch, and which settings would make it fit a device's memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cf_model.train.trainer.engine import EngineSpec

from .need import StageNeed

GIB = 2**30
# Choice: what the plan expects may be a third too much before a stage is refused; it was within a quarter wherever it was
# measured (benchmarks/plan_memory.py), and a stage that would have fitted must never be refused.
MEMORY_MARGIN = 1.5
DISK_MARGIN = 1.1


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


def refuse_memory(stage: str, one: StageNeed, leaner: StageNeed | None, free: float, where: str, split: WorkSplit) -> None:
    """Raise ValueError if a stage needs more than `MEMORY_MARGIN` times the `free` bytes of a rank.

    `leaner`: the need with activation checkpointing, where that is off. `where`: whose memory it is, for the sentence.
    """
    expected = split.peak(one)
    if expected <= MEMORY_MARGIN * free:
        return
    fixed, each = format_number(split.peak(one, 0) / GIB), format_number(one.sample_bytes() / GIB)
    parts = f"{fixed} for networks, gradients and optimisers and {each} for each of {split.at_once} samples at once"
    rank = f"a rank of {stage} of {split.ranks} with ZeRO {split.zero}" if split.ranks > 1 else stage
    need = f"{rank} needs about {format_number(expected / GIB)} GiB ({parts}), but this {where} has {format_number(free / GIB)}"
    raise ValueError(f"{need}; {suggest_remedy(one, leaner, free, split)}")


def refuse_disk(stage: str, written: Mapping[str, float], out: Path, work: Path) -> None:
    """Raise ValueError if a disk is too small for a stage's out or checkpoints, or for both where they lie on the same disk.

    Checkpoints of an earlier attempt make room, because new ones replace them.
    """
    wanted: dict[int, tuple[Path, float]] = {}
    reused = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    for path, size in ((out, written["out"]), (work, max(0.0, written["checkpoints"] - reused))):
        home = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        device = home.stat().st_dev
        wanted[device] = (home, wanted.get(device, (home, 0.0))[1] + size)
    for home, size in wanted.values():
        free = shutil.disk_usage(home).free
        if size > free * DISK_MARGIN:
            problem = f"{stage} writes up to {format_number(size / GIB)} GiB, but the disk of {home} has {format_number(free / GIB)} free"
            raise ValueError(f"{problem}; free some, or put the project on a larger disk")
