"""Scores of videos against the known world that they come from: of each video, each system, and of pairs of systems.

All results are derived from cells (cf_model/evaluate/cells.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cf_model.codec.interface import TIME, video_frames

from . import oracle
from .cells import Cell, group_values, iterate_values
from .course import list_borders, score_course
from .places import find_speed, heading_metrics, score_places
from .statistics import RATIOS, bootstrap, bootstrap_ratio, paired, paired_ratio

Truth = Mapping[str, Any]  # a world's facts (cf_model/data/worlds.py)
Video = UInt8[np.ndarray, "V Y X 3"]
PROTOCOL = "world/1"  # the number goes up when a metric of the known world changes its meaning
WINDOW = 2  # seconds of video in a point of a curve
EFFECT = "context_effect_"  # and the lag in seconds, of the metrics that `score_interventions` makes
ABSENT = ("map_error_absent", "map_error", "revisit_skill", "identity_4s")
DRIFTS = ("luma_drift", "sharpness_drift")
COMPARED = (  # suite, system, system, metric: over the videos that have the metric in both systems
    ("continuations", "teacher_fast", "teacher_slow_fast", "map_error"),
    ("continuations", "teacher_fast", "teacher_slow_fast", "map_error_recent"),
    *(("continuations", "teacher_fast", "teacher_slow_fast", metric) for metric in ("map_error_absent", "revisit_skill")),
    *(("continuations", "causal_init", "stage1", metric) for metric in ("map_error", *DRIFTS)),
    *(("continuations", "stage1", "stage2", metric) for metric in (*ABSENT, *DRIFTS)),
    *(("continuations", f"{student}_without_slow", student, metric) for student in ("stage1", "stage2") for metric in ABSENT),
    *(("recall", "stage1", "stage2", f"{name}_{level}") for name in ("recall_error", "slow_gain") for level in (75, 90)),
    ("prompts", "causal_init", "stage1", "sprite_recall"),
    ("prompts", "stage1", "stage2", "memory_ratio"),
    ("prompts", "stage1", "stage2", "motion"),
    ("prompts", "stage2_without_slow", "stage2", "memory_ratio"),
)
CURVES = ("sprite_recall", "sky_error", "sharpness", "motion", "compass_coherence")


def name_protocol(*, fps: int, gap: float, absence: float, sink: int) -> str:
    """Name the protocol of all metrics of the known world with the settings that their meaning depends on."""
    return f"{PROTOCOL},fps={fps},gap={gap:g},absence={absence:g},sink={sink}"


class Scored(NamedTuple):
    """What is known of a video: its metrics, its curves (metric, second, value), and what videos are compared by among themselves."""

    values: dict[str, float]
    curves: list[tuple[str, float, float]]
    view: dict[str, Any] | None  # None where no world is known


def score_video(
    video: Video, truth: Truth | None, prefix: int, *, fps: int, gap: float, absence: float, sink: int, chunk: int | None
) -> Scored:
    """Score a video by all metrics that apply to it, without its real prefix of frames, which is not the system's work.

    `gap`, `absence` (seconds) and `sink` (latent frames) are explained in params.yaml's section evaluate; `chunk` is the number of
    latents that were made at once, None for a real video.
    """
    borders = list_borders(len(video), first=prefix, latents=chunk, time=TIME) if chunk else None
    if truth is None:
        course = score_course(video, oracle.measure_motion(video), fps, prefix=prefix, borders=borders)
        return Scored(oracle.plain_metrics(video[prefix:]) | course, [], None)
    found = oracle.read_frames(video)
    new, visits, speed = found.cut(prefix), oracle.find_visits(video[prefix:], found.heading[prefix:]), find_speed(truth, fps)
    kept = oracle.find_bins_in_view(video[: video_frames(sink)])
    values = oracle.prompt_metrics(new, truth, fps) | oracle.memory_metrics(visits, fps, absence, kept=kept)
    values |= score_course(video, found.motion, fps, prefix=prefix, borders=borders)
    values |= score_places(video, found.heading, prefix=prefix, fps=fps, absence=absence, speed=speed, kept=kept)
    every = oracle.find_visits(video, found.heading) if prefix else visits
    values |= oracle.identity_metrics([visit for visit in every if visit.last > prefix], fps, kept=kept)
    if prefix:
        rules: dict[str, Any] = {"prefix": prefix, "fps": fps, "gap": gap, "absence": absence, "kept": kept}
        values |= oracle.map_metrics(every, truth, unit=video.shape[1] // 32, **rules)
        values |= heading_metrics(found.heading, truth, prefix, speed)
    view = {"map": oracle.build_map(visits), "sky": truth["sky"], "heading": new.heading}
    return Scored(values, list(average_windows(found, truth, fps)), view)


def average_windows(found: oracle.Reading, truth: Truth, fps: int) -> Iterator[tuple[str, float, float]]:
    """Yield metric, second and mean of each metric of CURVES in every window of a video, its real prefix included."""
    step = WINDOW * fps
    windows = len(found.heading) // step
    motion = np.append(0.0, found.motion)  # of a window, without the change from the frame before it
    frames = oracle.judge_frames(found, truth) | {"motion": motion}
    for name in CURVES:
        parts = frames[name][: windows * step].reshape(windows, step)[:, 1 if name == "motion" else 0 :]
        yield from ((name, float(WINDOW * k), float(part.mean())) for k, part in enumerate(parts))


def score_recall(rows: Sequence[Mapping[str, Any]], truths: Mapping[str, Truth | None]) -> list[dict[str, Any]]:
    """Return cells of `generate`'s one-step errors in the landmark row, where only the slow part can know what a column shows.

    recall_error_NN is the error at noise level 0.NN with the whole memory, slow_gain_NN the error without the slow part minus that.
    """
    errors: dict[tuple[str, str, float], dict[bool, float]] = defaultdict(dict)
    columns: dict[tuple[Any, ...], np.ndarray] = {}  # of a clip, the same for all systems with such a memory
    for row in rows:
        if truth := truths.get(row["clip"]):
            error = np.array(row["error"])  # [K, H, W]
            layout = {name: row[name] for name in ("start", "chunk", "sink", "fast")} | {"frames": len(error), "columns": error.shape[2]}
            if (key := (row["clip"], *layout.values())) not in columns:
                columns[key] = oracle.select_slow_columns(np.array(truth["heading"]), **layout, time=TIME)
            chosen = columns[key]
            if chosen.any():
                landmarks = error[:, error.shape[1] * oracle.LANDMARK_TOP // 32]
                errors[row["system"], row["clip"], row["sigma"]][row["slow"]] = float(landmarks[chosen].mean())
    cells = []
    for (system, clip, sigma), found in errors.items():
        about = {"suite": "recall", "system": system, "prompt": "", "clip": clip, "seed": 0, "file": clip}
        for name, value in (("recall_error", found[True]), ("slow_gain", found[False] - found[True])):
            cells.append(about | {"metric": f"{name}_{round(100 * sigma)}", "value": value})
    return cells


def score_interventions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return cells of `generate`'s continuations of two contexts that differ in one fact, which was last seen LAG seconds before.

    context_effect_LAGs of a pair is the share of its two continuations that follow their own context's fact, less the half that chance
    gives: 0.5 is memory, and 0 where both are the same because neither context is remembered.
    """
    cells = []
    for row in rows:
        clip = f"world-{row['world']}"
        key = {"suite": "recall", "system": row["system"], "prompt": "", "clip": clip, "seed": 0, "file": clip}
        value = float(np.mean([side > 0 for side in row["follows"]])) - 0.5
        cells.append(key | {"metric": f"{EFFECT}{row['lag']:g}s", "value": value})
    return cells


def find_effective_context(metrics: Mapping[str, Mapping[Any, float]], *, resamples: int, seed: int) -> float | None:
    """Return the longest lag, in seconds, whose effect has a lower bound above 0; None if there is none. `metrics`: name -> values."""
    lags = {float(name.removeprefix(EFFECT)[:-1]): [*values.values()] for name, values in metrics.items() if name.startswith(EFFECT)}
    return max((lag for lag, values in lags.items() if bootstrap(values, resamples=resamples, seed=seed).low > 0), default=None)


def compare_systems(cells: Sequence[Cell], *, resamples: int, seed: int) -> dict[str, Any]:
    """Compare pairs of systems video by video, so that a system can't win by lacking the videos that are hard."""
    values = group_values(cells)
    out = {}
    for suite, before, after, metric in COMPARED:
        tables = [[values.get((suite, system, name), {}) for name in RATIOS.get(metric, (metric,))] for system in (before, after)]
        first, second = tables
        if metric in RATIOS:
            pair = paired_ratio((first[0], first[1]), (second[0], second[1]), resamples=resamples, seed=seed)
        else:
            pair = paired(first[0], second[0], resamples=resamples, seed=seed)
        if pair:
            numbers = {"before": pair.first, "after": pair.second, "low": pair.change.low, "high": pair.change.high}
            finite = {name: value for name, value in numbers.items() if np.isfinite(value)}  # a single video has no interval
            out[f"{metric}: {before} to {after}"] = finite | {"videos": len(set.intersection(*map(set, [*first, *second])))}
    return out


def score_together(views: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return cells of what only all videos of a system together have. `views`: suite and system -> the view of each video."""
    cells = []
    for (suite, system), videos in views.items():
        values = {
            "videos": float(len(videos)),
            "diversity": oracle.measure_diversity([v["map"] for v in videos], [v["sky"] for v in videos]),
            "heading_perplexity": oracle.heading_perplexity([v["heading"] for v in videos]),
        }
        key = {"suite": suite, "system": system, "prompt": None, "clip": None, "seed": None, "file": None}
        cells += [key | {"metric": name, "value": value} for name, value in values.items() if value is not None]
    return cells


def summarise_systems(cells: Sequence[Cell], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return each system's means over videos, the ratios of means, and its metrics of all videos together."""
    values: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for cell in iterate_values(cells):
        values[cell["suite"]][cell["system"]][cell["metric"]][cell["file"], cell["seed"]] = cell["value"]
    out: dict[str, Any] = {
        suite: {system: mean_metrics(metrics) for system, metrics in systems.items()} for suite, systems in values.items()
    }
    for cell in cells:
        if cell["file"] is None:
            out[cell["suite"]][cell["system"]][cell["metric"]] = cell["value"]
    for system, metrics in values.get("recall", {}).items():
        if (lag := find_effective_context(metrics, resamples=resamples, seed=seed)) is not None:
            out["recall"][system]["effective_context"] = lag
    return out


def mean_metrics(metrics: Mapping[str, Mapping[tuple[str, int], float]]) -> dict[str, float]:
    """Return each metric's mean, the ratios of means, and, where not every video has the metric, the number of videos that have it."""
    most = max(map(len, metrics.values()))
    fewer = {f"{name}_videos": float(len(v)) for name, v in metrics.items() if len(v) < most}
    pairs = {name: (metrics.get(top, {}), metrics.get(bottom, {})) for name, (top, bottom) in RATIOS.items()}
    ratios = {name: bootstrap_ratio(*pair, resamples=1, seed=0) for name, pair in pairs.items()}
    means = {name: float(np.mean([*v.values()])) for name, v in metrics.items()}
    return means | {name: ratio.mean for name, ratio in ratios.items() if ratio} | fewer
