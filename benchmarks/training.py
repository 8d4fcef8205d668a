"""CPU time of a training step by stage and by the rollout's length: what it goes into, and the bytes of tensors that it holds at most.

  python -m benchmarks training [NAME ...]     four minutes of one core; writes results/training.json

Sizes and settings are those of profile tiny, with random weights and latents, by one thread. Stage 2 is also measured with rollouts of
fixed lengths, of which every step makes a new one. Each row makes one cycle of steps (up to an update of the student) to warm up, some
that are timed, and one whose tensors are counted. `benchmarks/steps.py` compares the settings of a step, `training_memory` shows the
process's memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common.machine import describe_machine, read_result, write_result
from benchmarks.portability import STAGES, build_stage
from cf_model.model.rollout import HorizonSpec
from tests.allocations import Allocations

LENGTHS = (21, 42, 84, 168)
CYCLES = 4  # that are timed


def build_rollout(frames: int) -> Any:
    """Build stage 2 with rollouts of one length."""
    trainer = build_stage("stage2")
    trainer.spec = replace(trainer.spec, horizon=HorizonSpec(frames, frames, 0, "const"), rollouts="each")
    return trainer


ROWS: dict[str, Callable[[], Any]] = {stage: (lambda stage=stage: build_stage(stage)) for stage in STAGES}
ROWS |= {f"stage2, rollouts of {frames}": (lambda frames=frames: build_rollout(frames)) for frames in LENGTHS}


def measure(name: str) -> dict[str, Any]:
    """Measure one row."""
    torch.manual_seed(0)
    trainer, number = ROWS[name](), count()
    cycle = getattr(trainer.spec, "critic_updates", 1) * (1 if name.startswith("stage") else 3)
    trainer.timer._read_now = time.process_time  # CPU time instead of the clock's, because others use the machine too
    for _ in range(cycle):
        trainer.step(next(number))
    cycles, parts = list[float](), dict[str, float]()
    for _ in range(CYCLES):
        began = time.process_time()
        for _ in range(cycle):
            trainer.timer.start()
            trainer.step(next(number))
            for part, seconds in trainer.timer.read_seconds().items():
                parts[part] = parts.get(part, 0.0) + seconds
        cycles.append(1000 * (time.process_time() - began) / cycle)
    with Allocations() as held:
        for _ in range(cycle):
            trainer.step(next(number))
    whole = parts.pop("step")
    return {
        "row": name,
        "median_ms": round(statistics.median(cycles), 1),
        "range_ms": [round(min(cycles), 1), round(max(cycles), 1)],
        "shares": {part: round(value / whole, 3) for part, value in parts.items()},
        "peak_mib": round(held.peak / 2**20, 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ROWS:
        if name not in ROWS:
            sys.exit(f"{name} is no row of this benchmark; known are {', '.join(ROWS)}")
        row = measure(name)
        print(row, flush=True)
        rows = {old["row"]: old for old in read_result("training").get("rows", [])} | {name: row}
        about = {"machine": describe_machine(), "profile": "tiny", "unit": "milliseconds of CPU time a step"}
        write_result("training", about | {"rows": [rows[name] for name in ROWS if name in rows]})


if __name__ == "__main__":
    main()
