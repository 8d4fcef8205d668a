"""Stage `evaluate`: videos measured against the known world that they come from."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from cf_model.data.video_reader import read_video
from cf_model.evaluate import scores
from cf_model.evaluate.statistics import bootstrap
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.params.schema import Params
from tasks.runner.track import Track, round_value

Curves = dict[tuple[str, str, str, float], dict[str, list[float]]]  # suite, system, metric, second -> prompt -> values


def run(params: Params, track: Track, *, samples: Path, clips: Path, out: Path) -> dict[str, Any]:
    """Score each video, then each system; results/cells.jsonl has every value, from which all other results are derived."""
    truths = {row["id"]: row["truth"] for row in read_json_lines(clips / "clips.jsonl")}
    videos, spec, fps = read_json_lines(samples / "index.jsonl"), params.evaluate, params.video.fps
    bar = track.progress(len(videos), "video")
    cells: list[dict[str, Any]] = []
    curves: Curves = defaultdict(lambda: defaultdict(list))
    views: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in videos:
        video = read_video(samples / row["file"], **params.video.model_dump())
        truth = truths.get(row["clip"])
        key = {name: row[name] for name in ("suite", "system", "prompt", "clip", "seed", "file")}
        rules = {"gap": spec.gap, "absence": spec.absence, "sink": spec.sink, "chunk": row.get("chunk")}
        found = scores.score_video(video, truth, row["prefix_frames"], fps=fps, **rules)
        cells += [key | {"metric": name, "value": round_value(value)} for name, value in found.values.items()]
        if found.view:
            views[row["suite"], row["system"]].append(found.view)
        for name, second, value in found.curves:
            curves[row["suite"], row["system"], name, second][row["prompt"]].append(value)
        bar.update()
    recall = scores.score_recall(read_json_lines(samples / "recall.jsonl", missing_ok=True), truths)
    cells += [cell | {"value": round_value(cell["value"])} for cell in recall]
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.jsonl").write_text(dump_json_lines(cells))
    write_curves(out / "curves.csv", curves, params)
    compared = scores.compare_systems(cells, resamples=spec.resamples, seed=params.seed)
    return scores.summarise_systems(cells, views) | {"compared": compared}


def write_curves(path: Path, curves: Curves, params: Params) -> None:
    """Write curves.csv: each metric's mean over prompts and its interval, window by window."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["suite", "system", "metric", "second", "mean", "low", "high"])
        for key, values in curves.items():
            interval = bootstrap(values, resamples=params.evaluate.resamples, seed=params.seed)
            table.writerow([*key, *map(round_value, interval)])
