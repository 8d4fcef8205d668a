"""Planes in which each system is a point: forgetting against drifting (Context Forcing, Fig. 1, as data), consistency against motion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .figures import Point, draw_points
from .report import Results, describe_metric
from .statistics import Interval, bootstrap

DRIFTING = ("luma_drift", "colour_drift", "sharpness_drift")
FORGETTING = {  # suite -> metric, and its words
    "prompts": ("memory_ratio", "colours of headings that come back, as a part of the difference between headings; 0 is perfect memory"),
    "continuations": ("map_error_absent", "distance from the true landmarks, where they were seen in the prefix and then out of sight"),
}
CONSISTENCY = ("subject_consistency", "dinov2")  # beginnings of names of metrics


def measure_drift(results: Results, suite: str, system: str) -> dict[str, list[float]]:
    """Measure how much a system's videos change in the long run: item -> a drift for each seed.

    Choice: the mean over DRIFTING, which are all parts of a video's own beginning a minute. Videos that lack one of them are left out.
    """
    metrics = [results.cells.get((suite, system, metric), {}) for metric in DRIFTING]
    drifts: dict[str, list[float]] = {}
    for item, seed in sorted(set.intersection(*map(set, metrics))):
        drifts.setdefault(item, []).append(float(np.mean([values[item, seed] for values in metrics])))
    return drifts


def draw_planes(results: Results, present: Mapping[str, Sequence[str]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Draw a plane of each suite that has both measures. Each has a title, a figure, its rows and what its axes mean."""
    planes = []
    for suite, systems in present.items():
        (metric, means), rows = FORGETTING[suite], []
        for system in systems:
            drifts, forgets = measure_drift(results, suite, system), results.interval(suite, system, metric)
            if drifts and forgets:
                rows.append({"system": system, "x": bootstrap(drifts, resamples=results.resamples, seed=results.seed), "y": forgets})
        drifting = "drifting: mean slope of brightness, colour and sharpness a minute, as parts of the video's first 2 s"
        axes = {"x": drifting, "y": f"forgetting: {describe_metric(metric).title}"}
        planes.append(build_plane(suite, rows, axes, colours, means))
    return [plane for plane in planes if len(plane["rows"]) > 1]


def draw_consistency(results: Results, present: Mapping[str, Sequence[str]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Draw consistency against motion for each suite: a frozen video is perfectly consistent, and only motion tells."""
    planes = []
    for suite, systems in present.items():
        names = [metric for metric in results.metrics(suite) if metric.startswith(CONSISTENCY)]
        for metric in names[:1]:
            pairs = [(system, results.interval(suite, system, "motion"), results.interval(suite, system, metric)) for system in systems]
            rows = [{"system": system, "x": x, "y": y} for system, x, y in pairs if x and y]
            axes = {"x": "motion: mean change from frame to frame, 0..255", "y": metric.replace("_", " ")}
            planes.append(build_plane(suite, rows, axes, colours, describe_metric(metric).means))
    return [plane for plane in planes if len(plane["rows"]) > 1]


def build_plane(suite: str, rows: list[dict[str, Any]], axes: dict[str, str], colours: Mapping[str, str], means: str) -> dict[str, Any]:
    """Return a plane's figure beside its rows."""
    points = [Point(colours[row["system"]], row["system"], row["x"], row["y"]) for row in rows]
    svg = draw_points(points, x=axes["x"].partition(":")[0], y=axes["y"].removeprefix("forgetting: ")) if points else ""
    return {"suite": suite, "rows": rows, "axes": axes, "svg": svg, "means": means}


def list_plane_rows(planes: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the rows of plane.csv, after a line of names."""
    names = ["suite", "system", "drift", "drift_low", "drift_high", "forgetting", "forgetting_low", "forgetting_high"]

    def numbers(interval: Interval) -> list[float | None]:
        return [float(f"{value:.6g}") if np.isfinite(value) else None for value in interval]

    rows = [[plane["suite"], row["system"], *numbers(row["x"]), *numbers(row["y"])] for plane in planes for row in plane["rows"]]
    return [names, *rows]
