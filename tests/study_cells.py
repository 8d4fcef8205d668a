"""Made-up cells for the tests of the study: never committed as cells, and never on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from study.nodes import compute_cell_key
from study.plan import Cell, Plan

CHANCE = 80.0  # distance between headings of the made-up real clips


def write_made_up(plan: Plan, folder: Path, error: Callable[[str, int], float], *, arms: set[str], seeds: set[int], **other: float) -> None:
    """Write cells of world orbit: `error` gives the map error of an arm and a seed; `other` metrics are the same for all."""
    folder = folder / plan.profile
    folder.mkdir(parents=True, exist_ok=True)
    for cell in plan.cells:
        if cell.counted and cell.world == "orbit" and cell.arm in arms and cell.seed in seeds:
            (folder / f"{cell.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(plan, cell, error, other)))


def make_rows(plan: Plan, cell: Cell, error: Callable[[str, int], float], other: dict[str, float]) -> list[dict[str, object]]:
    draw = np.random.default_rng(7)
    clips = {f"clip-{n:05d}": float(draw.normal(0, 3)) for n in range(12)}  # clips differ, in all cells alike
    head: dict[str, object] = {"kind": "cell", "world": cell.world, "arm": cell.arm, "seed": cell.seed, "counted": True}
    head |= {"key": compute_cell_key(plan, cell), "code": {"stage2": "a"}, "machine": {"cpu": "made up", "cores": 2, "memory_gib": 8.0}}
    head |= {"steps": 450, "updates": 120, "batch": 8, "tflop": 1.0, "seconds": {"stage2": 100.0}}

    def metric(suite: str, system: str, name: str, values: dict[str, float]) -> dict[str, object]:
        return {
            "kind": "metric",
            "suite": suite,
            "system": system,
            "metric": name,
            "mean": float(np.mean([*values.values()])),
            "clips": values,
        }

    def errors(mean: float) -> dict[str, float]:
        return {clip: mean + away for clip, away in clips.items()}

    if cell.arm == "teacher":
        levels = {"real": 0.1, "teacher": 0.3, "teacher_none": 0.9}
        rows = [metric("continuations", system, "map_error_absent", errors(level * CHANCE)) for system, level in levels.items()]
        return [head, *rows, metric("continuations", "real", "other_heading", {clip: CHANCE for clip in clips})]
    rows = [metric("continuations", "student", "map_error_absent", errors(error(cell.arm, cell.seed)))]
    for name, one in plan.metrics.items():
        if name != "map_error":
            rows.append(metric(one.suite, "student", one.name, {clip: other.get(name, 0.9) for clip in clips}))
    curve = {"kind": "curve", "suite": "prompts", "system": "student", "metric": "sky_error", "seconds": [0, 2, 4], "values": [1, 2, 3]}
    return [head, *rows, curve]
