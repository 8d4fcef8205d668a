"""Planes in which each system is a point: forgetting against drifting (Context Forcing, Fig. 1, as data), consistency against motion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .figures import Point, draw_points
from .report import Results, describe_metric
from .statistics import Interval, bootstrap

Windows = Mapping[tuple[str, str, str, float], Mapping[str, Sequence[float]]]  # suite, system, metric, second -> prompt -> values
DRIFTING = ("sharpness", "sky_error", "compass_coherence")
ENDS = 2  # windows at a video's beginning and at its end that are compared
FORGETTING = {"prompts": "memory_ratio", "continuations": "map_error_absent"}
CONSISTENCY = ("subject_consistency", "dinov2")  # beginnings of names of metrics


def measure_drift(windows: Windows, suite: str, system: str, first: float = 0) -> dict[str, list[float]]:
    """Measure how far a system's videos end from where they begin: prompt -> drift, from the windows that begin at second `first` or later.

    Drift is the mean over DRIFTING of |last two windows - first two|, in standard deviations of all windows of real clips, so that
    metrics of different units can be averaged. A metric that was not measured is left out.
    """
    drift: dict[str, list[float]] = {}
    for metric in DRIFTING:
        series = order_windows(windows, suite, system, metric, first)
        real = [value for values in order_windows(windows, suite, "real", metric, 0).values() for value in values]
        spread = float(np.std(real or [value for values in series.values() for value in values] or [0.0]))
        for prompt, values in series.items():
            if len(values) >= 2 * ENDS and spread > 0:
                drift.setdefault(prompt, []).append(abs(float(np.mean(values[-ENDS:]) - np.mean(values[:ENDS]))) / spread)
    return {prompt: [float(np.mean(values))] for prompt, values in drift.items()}


def order_windows(windows: Windows, suite: str, system: str, metric: str, first: float) -> dict[str, list[float]]:
    """Return a metric's values by prompt, each a mean over seeds, in the order of the seconds."""
    series: dict[str, list[float]] = {}
    keys = sorted(key for key in windows if key[:3] == (suite, system, metric) and key[3] >= first)
    for key in keys:
        for prompt, values in windows[key].items():
            series.setdefault(prompt, []).append(float(np.mean(values)))
    return series


def draw_planes(
    results: Results, windows: Windows, present: Mapping[str, Sequence[str]], colours: Mapping[str, str], prefix: float
) -> list[dict[str, Any]]:
    """Draw a plane of each suite that has both measures; `prefix`: seconds of a continuation that are real.

    Each has a title, a figure, its rows (system, drift, forgetting) and what its axes mean.
    """
    planes = []
    for suite, systems in present.items():
        metric, first, rows = FORGETTING[suite], prefix if suite == "continuations" else 0.0, []
        for system in systems:
            drifts, forgets = measure_drift(windows, suite, system, first), results.interval(suite, system, metric)
            if drifts and forgets:
                rows.append({"system": system, "x": bootstrap(drifts, resamples=results.resamples, seed=results.seed), "y": forgets})
        word = describe_metric(metric)
        drifting = "drifting: change from a video's beginning to its end, in deviations of real windows"
        axes = {"x": drifting, "y": f"forgetting: {word.title}"}
        planes.append(build_plane(suite, rows, axes, colours, word.means))
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
