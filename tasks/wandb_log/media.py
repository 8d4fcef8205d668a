"""What of a stage's outs W&B shows: sample videos and the table of results, under the same keys in every run, so that its
pages put the runs side by side. The rule is the report's: the first prompts of the index, first seed; nothing is picked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

VIDEOS = 4  # of each system, at most
BYTES = 64_000_000  # of all videos together; W&B copies each
COLUMNS = ("suite", "system", "metric", "mean", "low", "high", "videos")


class Clip(NamedTuple):
    file: Path
    caption: str


def videos(out: Path) -> dict[str, list[Clip]]:
    """videos/<suite>/<system> -> its first videos, in the order of the prompts; from a folder with an index.jsonl."""
    found: dict[str, list[Clip]] = {}
    first: dict[tuple[str, str], int] = {}
    left = BYTES
    for row in _rows(out / "index.jsonl"):
        clips = found.setdefault(f"videos/{row['suite']}/{row['system']}", [])
        seed, file = first.setdefault((row["suite"], row["prompt"]), row["seed"]), out / row["file"]
        if row["seed"] != seed or len(clips) == VIDEOS or not file.exists() or file.stat().st_size > left:
            continue
        left -= file.stat().st_size
        clips.append(Clip(file, f"{row['prompt']} (seed {row['seed']})"))
    return {key: clips for key, clips in found.items() if clips}


def table(out: Path, metrics: Mapping[str, Any], *, resamples: int, seed: int) -> list[tuple[Any, ...]]:
    """COLUMNS, a row for each suite, system and metric: mean over videos with its 95 % interval over prompts, where there is
    one; from a folder with a cells.jsonl, and `metrics` for what only all videos of a system together can tell."""
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in _rows(out / "cells.jsonl"):
        if row["value"] is not None:
            place = cells.setdefault((row["suite"], row["system"], row["metric"]), {})
            place.setdefault(row["clip"] or row["prompt"], []).append(row["value"])
    if not cells:
        return []
    from cf_model.evaluate.statistics import bootstrap

    found: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    for (suite, system), values in _systems(metrics):
        found |= {(suite, system, metric): (value, None, None, None) for metric, value in values.items()}
    for key, prompts in cells.items():
        i = bootstrap(prompts, resamples=resamples, seed=seed)
        ends = (i.low, i.high) if i.known else (None, None)
        found[key] = (i.mean, *ends, sum(map(len, prompts.values())))
    return [(*place, *numbers) for place, numbers in sorted(found.items())]


def _systems(metrics: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """(suite, system) -> its numbers. Pairs of systems (`compared`) are summary values only: names of theirs hold both."""
    for suite, systems in metrics.items():
        if isinstance(systems, Mapping) and suite != "compared":
            yield from (((suite, system), values) for system, values in systems.items() if isinstance(values, Mapping))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines() if line.strip())
