"""Stage `evaluate`: videos measured against the known world that they come from."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cf_model.data import worlds
from cf_model.data.video_reader import read_video
from cf_model.evaluate import course, failures, oracle, places, scores
from cf_model.evaluate.cells import Cell, expand_lines, fold_cells, group_curves, hash_code
from cf_model.evaluate.statistics import bootstrap
from cf_model.metrics import pooled, vbench, windowed
from tasks.files.hashes import hash_file
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.params.schema import Params
from tasks.runner.track import Track, round_value


def run(params: Params, track: Track, *, samples: Path, clips: Path, out: Path) -> dict[str, Any]:
    """Score each video into results/cells.jsonl, and derive all other results from this file alone."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.jsonl").write_text(dump_json_lines(fold_cells(score_videos(params, track, samples, clips))))
    return derive_results(params, out)


def score_videos(params: Params, track: Track, samples: Path, clips: Path) -> Iterator[Cell]:
    """Yield the cells of all videos, of all videos of a system together, and of the one-step errors."""
    truths = {row["id"]: row["truth"] for row in read_json_lines(clips / "clips.jsonl")}
    videos, fps = read_json_lines(samples / "index.jsonl"), params.video.fps
    settings: dict[str, Any] = params.evaluate.model_dump(include={"gap", "absence", "sink"})
    modules = (course, failures, oracle, places, scores, worlds)
    about = {"code": hash_code(*modules), "protocol": scores.name_protocol(fps=fps, **settings)}
    by_pixels = {"code": hash_code(pooled, vbench, windowed), "weights": "pooled-8x8"}
    bar = track.progress(len(videos), "video")
    views: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in videos:
        file = samples / row["file"]
        video, truth, prefix = read_video(file, **params.video.model_dump()), truths.get(row["clip"]), row["prefix_frames"]
        key = {name: row[name] for name in ("suite", "system", "prompt", "clip", "seed", "file")} | {"md5": hash_file(file)} | about
        key |= {"frames": len(video), "fps": fps}
        found = scores.score_video(video, truth, prefix, fps=fps, chunk=row.get("chunk"), **settings)
        yield from (key | {"metric": name, "value": round_value(value)} for name, value in found.values.items())
        if found.view:
            views[row["suite"], row["system"]].append(found.view)
        for name, second, value in found.curves:  # not rounded, because their means will be
            yield key | {"metric": name, "second": second, "value": value if math.isfinite(value) else None}
        events = failures.find_failures(video, fps=fps, first=prefix)
        yield key | {"metric": "failures", "value": len(events)} | ({"events": events} if events else {})
        for protocol, name, value in pooled.score_pooled(video[prefix:], fps):
            yield key | by_pixels | {"protocol": protocol, "metric": name, "value": round_value(value)}
        bar.update()
    recall = scores.score_recall(read_json_lines(samples / "recall.jsonl", missing_ok=True), truths)
    recall += scores.score_interventions(read_json_lines(samples / "interventions.jsonl", missing_ok=True))
    yield from (cell | about | {"value": round_value(cell["value"])} for cell in recall)
    yield from (cell | about for cell in scores.score_together(views))


def derive_results(params: Params, results: Path) -> dict[str, Any]:
    """Write curves.csv and return the stage's metrics, from the cells in the folder `results`; no video is read."""
    file = results / "cells.jsonl"
    cells = expand_lines(read_json_lines(file), str(file))
    write_curves(results / "curves.csv", cells, params)
    rules: dict[str, Any] = {"resamples": params.evaluate.resamples, "seed": params.seed}
    return scores.summarise_systems(cells, **rules) | {"compared": scores.compare_systems(cells, **rules)}


def write_curves(path: Path, cells: list[dict[str, Any]], params: Params) -> None:
    """Write curves.csv: each metric's mean over prompts and its interval, window by window."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["suite", "system", "metric", "second", "mean", "low", "high"])
        for key, values in group_curves(cells).items():
            interval = bootstrap(values, resamples=params.evaluate.resamples, seed=params.seed)
            table.writerow([*key, *map(round_value, interval)])
