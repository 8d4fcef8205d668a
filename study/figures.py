"""The page's pictures: points and curves of the cells, one line for each arm; every training seed is drawn."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cf_model.evaluate.figures import PALETTE
from study.inference import Evidence
from study.plan import Curve


def draw_plane(evidence: Evidence, world: str, arms: Sequence[str]) -> bytes | None:
    """Draw the forgetting-drifting plane (fig. 1 of the paper as data): a point for each seed, a larger one for their mean."""
    metrics = [evidence.plan.metrics[name] for name in ("drift", "map_error")]
    figure, axes = _start("drift of the sky's colour", "map error after absence", "less of both is down and left")
    for colour, arm in zip(PALETTE, arms, strict=False):
        seeds = sorted(seed for w, a, seed in evidence.cells if (w, a) == (world, arm))
        found = [[evidence.mean(world, arm, seed, metric) for metric in metrics] for seed in seeds]
        points = np.array([pair for pair in found if None not in pair], float)
        if len(points):
            axes.plot(*points.T, "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(*points.mean(axis=0), "o", color=colour, markersize=8, label=f"{arm} ({len(points)})")
    return _finish(figure, axes)


def draw_curve(evidence: Evidence, world: str, curve: Curve) -> bytes | None:
    """Draw the primary metric over what a line's arms differ in: the mean over seeds, and every seed."""
    metric = evidence.plan.metrics["map_error"]
    figure, axes = _start(curve.title.lower(), "map error after absence", "")
    for colour, (name, arms) in zip(PALETTE, curve.lines.items(), strict=False):
        places, means = [], []
        for x, arm in zip(curve.x, arms, strict=True):
            seeds = sorted(seed for w, a, seed in evidence.cells if (w, a) == (world, arm))
            values = [value for seed in seeds if (value := evidence.mean(world, arm, seed, metric)) is not None]
            axes.plot([x] * len(values), values, "o", color=colour, markersize=3, alpha=0.5)
            if values:
                places.append(x)
                means.append(np.mean(values))
        if places:
            axes.plot(places, means, "-o", color=colour, label=name)
    return _finish(figure, axes)


def draw_over_time(evidence: Evidence, world: str, arms: Sequence[str], metric: str) -> bytes | None:
    """Draw a windowed metric of prompts' videos over time: each seed faintly, and their mean."""
    figure, axes = _start("second of the video", metric.replace("_", " "), "")
    for colour, arm in zip(PALETTE, arms, strict=False):
        cells = [cell for (w, a, _), cell in sorted(evidence.cells.items()) if (w, a) == (world, arm)]
        rows = [row for cell in cells for row in cell.rows if row["kind"] == "curve"]
        rows = [row for row in rows if (row["suite"], row["system"], row["metric"]) == ("prompts", "student", metric)]
        for row in rows:
            axes.plot(row["seconds"], row["values"], color=colour, linewidth=0.6, alpha=0.4)
        if rows:
            axes.plot(rows[0]["seconds"], np.mean([row["values"] for row in rows], axis=0), color=colour, label=f"{arm} ({len(rows)})")
    return _finish(figure, axes)


def _start(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.15, linewidth=0.6)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> bytes | None:
    """Return the picture as a PNG without a date; None where nothing was drawn."""
    if not axes.get_legend_handles_labels()[1]:
        return None
    axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
