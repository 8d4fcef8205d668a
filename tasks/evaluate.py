"""Stage `evaluate`: videos measured against the known world that they come from."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cf_model.codec.interface import TIME, video_frames
from cf_model.data import worlds
from cf_model.data.video_reader import read_video
from cf_model.evaluate import oracle
from cf_model.evaluate.statistics import RATIOS, bootstrap, bootstrap_ratio, paired, paired_ratio
from cf_model.evaluate.stutter import measure_stutter
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.params.schema import Params
from tasks.runner.track import Track, round_value

Curves = dict[tuple[str, str, str, float], dict[str, list[float]]]  # suite, system, metric, second -> prompt -> values
WINDOW = 2  # seconds of video in a point of a curve
COMPARED = (  # suite, system, system, metric: over the videos that have the metric in both systems
    ("continuations", "teacher_fast", "teacher_slow_fast", "map_error"),
    ("continuations", "teacher_fast", "teacher_slow_fast", "map_error_recent"),
    ("continuations", "stage1", "stage2", "map_error"),
    ("continuations", "stage1", "stage2", "map_error_absent"),
    *(("recall", "stage1", "stage2", f"{name}_{level}") for name in ("recall_error", "slow_gain") for level in (75, 90)),
    ("prompts", "stage1", "stage2", "memory_ratio"),
    ("prompts", "stage1", "stage2", "motion"),
)
CURVES = ("sprite_recall", "sky_error", "sharpness", "motion", "compass_coherence")


def run(params: Params, track: Track, *, samples: Path, clips: Path, out: Path) -> dict[str, Any]:
    """Score each video, then each system; results/cells.jsonl has every value, from which all other results are derived."""
    truths = {row["id"]: row["truth"] for row in read_json_lines(clips / "clips.jsonl")}
    videos = read_json_lines(samples / "index.jsonl")
    bar = track.progress(len(videos), "video")
    cells: list[dict[str, Any]] = []
    curves: Curves = defaultdict(lambda: defaultdict(list))
    views: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in videos:
        video = read_video(samples / row["file"], **params.video.model_dump())
        truth = truths.get(row["clip"])
        key = {name: row[name] for name in ("suite", "system", "prompt", "clip", "seed", "file")}
        for name, value in score_video(params, video, truth, row["prefix_frames"]).items():
            cells.append(key | {"metric": name, "value": round_value(value)})
        if truth:
            new = video[row["prefix_frames"] :]
            view = {"map": oracle.build_map(new), "sky": truth["sky"], "heading": oracle.read_heading(new)[0]}
            views[row["suite"], row["system"]].append(view)
            step = WINDOW * params.video.fps
            for first in range(0, len(video) - step + 1, step):
                values = oracle.prompt_metrics(video[first : first + step], truth, params.video.fps)
                for name in CURVES:
                    curves[row["suite"], row["system"], name, first / params.video.fps][row["prompt"]].append(values[name])
        bar.update()
    cells += score_recall(read_json_lines(samples / "recall.jsonl", missing_ok=True), truths)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.jsonl").write_text(dump_json_lines(cells))
    write_curves(out / "curves.csv", curves, params)
    return summarise_systems(cells, views) | {"compared": compare_systems(cells, params)}


def compare_systems(cells: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    """Compare pairs of systems video by video, so that a system can't win by lacking the videos that are hard."""
    values: dict[tuple[str, str, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for cell in cells:
        values[cell["suite"], cell["system"], cell["metric"]][cell["clip"] or cell["prompt"], cell["seed"]] = cell["value"]
    out = {}
    resamples, seed = params.evaluate.resamples, params.seed
    for suite, before, after, metric in COMPARED:
        tables = [[values[suite, system, name] for name in RATIOS.get(metric, (metric,))] for system in (before, after)]
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


def score_video(params: Params, video: np.ndarray, truth: dict[str, Any] | None, prefix: int) -> dict[str, float]:
    """Score a video by all metrics that apply to it, without its real prefix, which is not the system's work."""
    fps, gap = params.video.fps, params.evaluate.gap
    new = video[prefix:]
    stutter = measure_stutter(video, period=TIME, first=prefix)
    values = {} if stutter is None else {"stutter": stutter}
    if truth is None:
        return values | oracle.plain_metrics(new)
    absence, kept = params.evaluate.absence, oracle.find_bins_in_view(video[: video_frames(params.evaluate.sink)])
    values |= oracle.prompt_metrics(new, truth, fps) | oracle.memory_metrics(new, fps, absence, kept=kept)
    if prefix:
        values |= oracle.map_metrics(video, truth, prefix=prefix, fps=fps, gap=gap, absence=absence, kept=kept)
    return values


def score_recall(rows: list[dict[str, Any]], truths: dict[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Return cells of `generate`'s one-step errors in the landmark row, where only the slow part can know what a column shows.

    recall_error_NN is the error at noise level 0.NN with the whole memory, slow_gain_NN the error without the slow part minus that.
    """
    errors: dict[tuple[str, str, float], dict[bool, float]] = defaultdict(dict)
    for row in rows:
        if truth := truths.get(row["clip"]):
            error = np.array(row["error"])  # [K, H, W]
            layout = {name: row[name] for name in ("start", "chunk", "sink", "fast")}
            chosen = oracle.select_slow_columns(np.array(truth["heading"]), **layout, frames=len(error), columns=error.shape[2], time=TIME)
            if chosen.any():
                landmarks = error[:, error.shape[1] * worlds.LANDMARK_ROWS.start // 32]
                errors[row["system"], row["clip"], row["sigma"]][row["slow"]] = float(landmarks[chosen].mean())
    cells = []
    for (system, clip, sigma), found in errors.items():
        key = {"suite": "recall", "system": system, "prompt": "", "clip": clip, "seed": 0, "file": clip}
        for name, value in (("recall_error", found[True]), ("slow_gain", found[False] - found[True])):
            cells.append(key | {"metric": f"{name}_{round(100 * sigma)}", "value": round_value(value)})
    return cells


def write_curves(path: Path, curves: Curves, params: Params) -> None:
    """Write curves.csv: each metric's mean over prompts and its interval, window by window."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["suite", "system", "metric", "second", "mean", "low", "high"])
        for key, values in curves.items():
            interval = bootstrap(values, resamples=params.evaluate.resamples, seed=params.seed)
            table.writerow([*key, *map(round_value, interval)])


def summarise_systems(cells: list[dict[str, Any]], views: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Return each system's means over videos, and its metrics of all videos together (diversity, headings, ratios of means)."""
    values: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for cell in cells:
        values[cell["suite"]][cell["system"]][cell["metric"]][cell["file"], cell["seed"]] = cell["value"]
    out: dict[str, Any] = {
        suite: {system: mean_metrics(metrics) for system, metrics in systems.items()} for suite, systems in values.items()
    }
    for (suite, system), videos in views.items():
        more = {
            "videos": float(len(videos)),
            "diversity": oracle.measure_diversity([v["map"] for v in videos], [v["sky"] for v in videos]),
            "heading_perplexity": oracle.heading_perplexity([v["heading"] for v in videos]),
        }
        out[suite][system] |= {name: value for name, value in more.items() if value is not None}
    return out


def mean_metrics(metrics: dict[str, dict[tuple[str, int], float]]) -> dict[str, float]:
    """Return each metric's mean, the ratios of means, and, where not every video has the metric, the number of videos that have it."""
    most = max(map(len, metrics.values()))
    fewer = {f"{name}_videos": float(len(v)) for name, v in metrics.items() if len(v) < most}
    pairs = {name: (metrics.get(top, {}), metrics.get(bottom, {})) for name, (top, bottom) in RATIOS.items()}
    ratios = {name: bootstrap_ratio(*pair, resamples=1, seed=0) for name, pair in pairs.items()}
    means = {name: float(np.mean([*v.values()])) for name, v in metrics.items()}
    return means | {name: ratio.mean for name, ratio in ratios.items() if ratio} | fewer
