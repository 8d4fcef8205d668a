"""What W&B shows of a stage's outs: sample videos and the table of results, under the same keys in every run.

W&B puts runs with equal keys side by side. The choice of videos is the report's: the first prompts of the index, first seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.files.json_lines import read_json_lines

MOST_VIDEOS = 4  # of each system
MOST_BYTES = 64_000_000  # of all videos together; W&B copies each
TABLE_COLUMNS = ("suite", "system", "metric", "mean", "low", "high", "videos")


def select_videos(out: Path) -> dict[str, list[tuple[Path, str]]]:
    """Select the first videos of each system in the order of the prompts: videos/<suite>/<system> -> files with captions.

    Empty for an out that has no index.jsonl.
    """
    selected: dict[str, list[tuple[Path, str]]] = {}
    first_seeds: dict[tuple[str, str], int] = {}
    bytes_left = MOST_BYTES
    for row in read_json_lines(out / "index.jsonl", missing_ok=True):
        videos = selected.setdefault(f"videos/{row['suite']}/{row['system']}", [])
        seed, file = first_seeds.setdefault((row["suite"], row["prompt"]), row["seed"]), out / row["file"]
        if row["seed"] != seed or len(videos) == MOST_VIDEOS or not file.exists() or file.stat().st_size > bytes_left:
            continue
        bytes_left -= file.stat().st_size
        videos.append((file, f"{row['prompt']} (seed {row['seed']})"))
    return {key: videos for key, videos in selected.items() if videos}


def build_table(out: Path, metrics: Mapping[str, Any], *, resamples: int, seed: int) -> list[tuple[Any, ...]]:
    """Build the rows of TABLE_COLUMNS, one for each suite, system and metric: mean over videos, 95 % interval over prompts.

    From cells.jsonl of the out, and from `metrics` (without interval) for what only all videos of a system together have, such
    as diversity. Empty for an out that has no cells.jsonl.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in read_json_lines(out / "cells.jsonl", missing_ok=True):
        if row["value"] is not None:
            prompts = cells.setdefault((row["suite"], row["system"], row["metric"]), {})
            prompts.setdefault(row["clip"] or row["prompt"], []).append(row["value"])
    if not cells:
        return []
    from cf_model.evaluate.statistics import bootstrap

    table: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    for (suite, system), values in _list_systems(metrics):
        table |= {(suite, system, metric): (value, None, None, None) for metric, value in values.items()}
    for key, prompts in cells.items():
        interval = bootstrap(prompts, resamples=resamples, seed=seed)
        ends = (interval.low, interval.high) if interval.has_ends else (None, None)
        table[key] = (interval.mean, *ends, sum(map(len, prompts.values())))
    return [(*place, *numbers) for place, numbers in sorted(table.items())]


def _list_systems(metrics: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """Yield ((suite, system), its numbers). Pairs of systems (`compared`) are left out: they belong to no single system."""
    for suite, systems in metrics.items():
        if isinstance(systems, Mapping) and suite != "compared":
            yield from (((suite, system), values) for system, values in systems.items() if isinstance(values, Mapping))
