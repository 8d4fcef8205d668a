"""What stands for a stage's videos and numbers where a few must do: the first videos of each system, and a table with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .cells import expand_lines, group_values
from .statistics import bootstrap

Row = Mapping[str, Any]  # of samples/index.jsonl or results/cells.jsonl
MOST_VIDEOS = 4  # of each system
MOST_BYTES = 64_000_000  # of all videos together
TABLE_COLUMNS = ("suite", "system", "metric", "mean", "low", "high", "videos")


def select_videos(index: Iterable[Row], out: Path) -> dict[str, list[tuple[Path, str]]]:
    """Select the first videos of each system in the order of the prompts: videos/<suite>/<system> -> files with captions.

    `index` has a row for each video in the folder `out`.
    """
    selected: dict[str, list[tuple[Path, str]]] = {}
    first_seeds: dict[tuple[str, str], int] = {}
    bytes_left = MOST_BYTES
    for row in index:
        videos = selected.setdefault(f"videos/{row['suite']}/{row['system']}", [])
        seed, file = first_seeds.setdefault((row["suite"], row["prompt"]), row["seed"]), out / row["file"]
        if row["seed"] != seed or len(videos) == MOST_VIDEOS or not file.exists() or file.stat().st_size > bytes_left:
            continue
        bytes_left -= file.stat().st_size
        videos.append((file, f"{row['prompt']} (seed {row['seed']})"))
    return {key: videos for key, videos in selected.items() if videos}


def build_table(cells: Iterable[Row], metrics: Mapping[str, Any], *, resamples: int, seed: int) -> list[tuple[Any, ...]]:
    """Build the rows of TABLE_COLUMNS, one for each suite, system and metric: mean over videos, 95 % interval over prompts.

    From the lines of the stage evaluate's cells, and from its `metrics` (without interval) for what only all videos of a system
    together have, such as diversity.
    """
    table: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    for suite in metrics.keys() - {"compared"}:  # which are pairs of systems
        for system, means in metrics[suite].items():
            table |= {(suite, system, metric): (value, None, None, None) for metric, value in means.items()}
    for key, videos in group_values(expand_lines(cells, "results/cells.jsonl")).items():
        prompts: dict[str, list[float]] = {}
        for (item, _), value in videos.items():
            prompts.setdefault(item, []).append(value)
        interval = bootstrap(prompts, resamples=resamples, seed=seed)
        ends = (interval.low, interval.high) if interval.has_ends else (None, None)
        table[key] = (interval.mean, *ends, sum(map(len, prompts.values())))
    return [(*place, *numbers) for place, numbers in sorted(table.items())]
