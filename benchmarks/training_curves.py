"""The pictures of docs/training.md: what the training stages of a finished run said while they ran.

  python benchmarks/training_curves.py [--project . --out docs]     writes training-flow.png, -students.png, -memory.png, -seconds.png

Reads models/*/metrics.csv and params.yaml, and for the seconds runtime/*.timing.jsonl. Thin: every row; thick: the mean of
the last twentieth of the steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
sys.path.insert(0, str(Path(__file__).parent.parent))
from matplotlib import pyplot

from tasks.params.yaml_file import read_yaml

FLOW, STUDENTS = ("base", "teacher", "causal_init"), ("stage1", "stage2")
QUANTILES = ("q05", "q25", "q50", "q75", "q95")
PARTS = ("data", "loss", "rollout", "scores", "replay", "critic", "update", "samples", "save", "rest")
Curve = tuple[list[float], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    rows = {stage: curves(args.project / "models" / stage / "metrics.csv") for stage in (*FLOW, *STUDENTS)}
    stated = read_yaml(args.project / "params.yaml")
    grid(rows, FLOW, ("loss", "gradient", "ema_distance", "bank_fill", "bank_rms"), args.out / "training-flow.png")
    names = ("critic_loss", "critic_gradient", "score_distance", "normaliser", "student_loss", "student_gradient", "ema_distance")
    grid(rows, STUDENTS, (*names, "frames", "exit"), args.out / "training-students.png")
    memory(rows, stated, args.out / "training-memory.png")
    seconds(args.project / "runtime", args.out / "training-seconds.png")


def curves(path: Path) -> dict[str, Curve]:
    """Of every value: the steps that have it, and what it was."""
    found: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
    return found


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Means of the last `width` values; of as many as there are at the beginning."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    return (sums[ends] - sums[np.maximum(ends - width, 0)]) / np.minimum(ends, width)


def draw(axes: Any, curve: Curve, colour: str, label: str | None = None) -> None:
    steps, values = curve
    axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
    axes.plot(steps, smooth(values, max(1, len(values) // 20)), color=colour, linewidth=1.5, label=label)


def grid(rows: dict[str, dict[str, Curve]], stages: Sequence[str], names: Sequence[str], path: Path) -> None:
    """A row of panels a value, a column a stage; a stage without the value leaves its place empty."""
    shape = {"squeeze": False, "layout": "constrained"}
    figure, table = pyplot.subplots(len(names), len(stages), figsize=(3.6 * len(stages), 1.45 * len(names)), **shape)
    for line, name in zip(table, names, strict=True):
        for axes, stage in zip(line, stages, strict=True):
            if name not in rows[stage]:
                axes.set_axis_off()
                continue
            draw(axes, rows[stage][name], "C0")
            if name == "loss" and "loss_without_context" in rows[stage]:
                draw(axes, rows[stage]["loss_without_context"], "C1", "without context")
                axes.legend(frameon=False, fontsize=7)
            axes.set_title(f"{stage}: {name}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_ylim(bottom=0)
    save(figure, path)


def memory(rows: dict[str, dict[str, Curve]], stated: dict[str, Any], path: Path) -> None:
    """Where tau lies among the similarities that are compared with it, and what is kept."""
    stages = [stage for stage in ("causal_init", *STUDENTS) if "similarity/q50" in rows[stage]]
    shape = {"sharex": "col", "squeeze": False, "layout": "constrained"}
    figure, (upper, lower) = pyplot.subplots(2, len(stages), figsize=(3.6 * len(stages), 4.4), **shape)
    for axes, below, stage in zip(upper, lower, stages, strict=True):
        found = rows[stage]
        steps = found["similarity/q50"][0]
        low, first, middle, third, high = (found[f"similarity/{name}"][1] for name in QUANTILES)
        axes.fill_between(steps, low, high, color="C0", alpha=0.15, linewidth=0, label="5 to 95 %, of each step")
        first, middle, third = (smooth(values, max(1, len(steps) // 20)) for values in (first, middle, third))
        axes.fill_between(steps, first, third, color="C0", alpha=0.3, linewidth=0, label="25 to 75 %")
        axes.plot(steps, middle, color="C0", label="median")
        axes.axhline(stated[stage]["memory"]["tau"], color="black", linestyle="--", linewidth=1, label="tau")
        axes.set_title(f"{stage}: similarity of tested chunks", fontsize=8)
        axes.legend(frameon=False, fontsize=7)
        layers = [name for name in found if name.startswith("promotion/layer_")]
        for number, name in enumerate(layers):
            at, values = found[name]
            style = {"linewidth": 0.8, "color": f"C{number + 1}", "label": name.removeprefix("promotion/")}
            below.plot(at, smooth(values, max(1, len(at) // 20)), **style)
        draw(below, found["promotion"], "black", "promotion")
        below.set_title(f"{stage}: share that is kept", fontsize=8)
        below.set(ylim=(-0.02, 1.02))
        below.set_xlabel("step", fontsize=8)
        below.legend(frameon=False, fontsize=7, ncol=2)
        for one in (axes, below):
            one.tick_params(labelsize=7)
    save(figure, path)


def seconds(runtime: Path, path: Path) -> None:
    """A bar a stage: the mean seconds of a step, by part."""
    files = {stage: runtime / f"{stage}.timing.jsonl" for stage in (*FLOW, *STUDENTS)}
    times = {stage: [json.loads(line) for line in file.read_text().splitlines()] for stage, file in files.items() if file.exists()}
    if not times:
        return
    figure, axes = pyplot.subplots(figsize=(7.2, 2.4), layout="constrained")
    left = np.zeros(len(times))
    for number, part in enumerate(PARTS):
        means = np.array([math.fsum(row.get(f"seconds/{part}", 0.0) for row in found) / len(found) for found in times.values()])
        if means.any():
            axes.barh(list(times), means, left=left, label=part, color=f"C{number}")
            left += means
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, mean", fontsize=8)
    axes.tick_params(labelsize=8)
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
