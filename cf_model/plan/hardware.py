"""What a training will run on: the GPUs or the CPU of this machine, or of one that is described."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .fit import GIB, format_number
from .need import StageNeed

CGROUPS = (  # limit and use, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# TFLOP/s that a process reaches in profile tiny on one core of an Intel Xeon: 26 to 38 GFLOP/s (benchmarks/results/plan-hours.json)
CPU_TFLOPS = 0.032
H100_TFLOPS = 989.0  # TFLOP/s, bfloat16, by its data sheet
DEFAULT_MEMORY = 80.0  # GiB of a GPU that is neither here nor described


@dataclass(frozen=True)
class Hardware:
    """What the stages will run on."""

    ranks: int
    memory: float  # bytes of one rank
    tflops: float  # that one rank reaches
    unit: str  # GPU or CPU
    description: str


def estimate_hours(one: StageNeed, machine: Hardware) -> float:
    """Return the hours of a stage at the speed that the hardware reaches."""
    return one.total / (machine.ranks * machine.tflops * 1e12) / 3600


def count_gpus() -> int:
    """Return the number of GPUs that torch can use."""
    return torch.cuda.device_count()


def measure_memory() -> float:
    """Return the bytes of the device that a stage computes on: all of a GPU, or what is free of the CPU's, in a container of its share."""
    if count_gpus():
        return float(torch.cuda.get_device_properties(0).total_memory)
    free = [float(psutil.virtual_memory().available)]
    for limit, used in CGROUPS:
        try:
            free.append(float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or its word is `max`
            continue
    return min(free)


def describe_hardware(gpus: int | None, memory: float | None, tflops: float | None, utilisation: float) -> Hardware:
    """Return the hardware as the options state it, and what they leave out as this machine has it."""
    count = gpus if gpus is not None else 1 if memory else count_gpus()
    if not count:
        free, reached = measure_memory(), tflops * utilisation if tflops else CPU_TFLOPS
        cpu = f"1 process on the CPU, {format_number(free / GIB)} GiB free, {format_number(reached * 1000)} GFLOP/s"
        return Hardware(1, free, reached, "CPU", cpu + ("" if tflops else " (what profile tiny reaches on one core)"))
    size = memory * GIB if memory else measure_memory() if count_gpus() else DEFAULT_MEMORY * GIB
    peak = tflops or H100_TFLOPS
    gpu = f"{count} GPU{'s' * (count > 1)} of {format_number(size / GIB)} GiB, {utilisation:.0%} of {format_number(peak)} TFLOP/s each"
    return Hardware(count, size, peak * utilisation, "GPU", gpu)
