"""The last lines of `cf repro`: where the report and the videos are, and five numbers of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = {  # label -> stage whose metrics/<stage>.json has the number, and the keys to it
    "base, sprite recall": ("evaluate", "prompts", "base", "sprite_recall"),
    "stage1, sprite recall": ("evaluate", "prompts", "stage1", "sprite_recall"),
    "teacher, map error after 10 real seconds": ("evaluate", "continuations", "teacher_slow_fast", "map_error"),
    "stage2, memory ratio (0 remembers all)": ("evaluate", "prompts", "stage2", "memory_ratio"),
    "stage2, diversity between its videos": ("evaluate", "prompts", "stage2", "diversity"),
}


def summarize_run(root: Path) -> str:
    """Return the lines for the project in `root`; a number that no stage has written is `not measured`."""
    places = {"report": root / "reports/report.html", "videos": root / "samples"}
    lines = [f"{name:<42} {path}" for name, path in places.items() if path.exists()]
    lines += [f"{label:<42} {_read_metric(root / 'metrics', *keys)}" for label, keys in METRICS.items()]
    return "\n".join(lines)


def _read_metric(metrics: Path, stage: str, *keys: str) -> str:
    file = metrics / f"{stage}.json"
    value: Any = json.loads(file.read_text()) if file.exists() else None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return f"{value:.4g}" if isinstance(value, int | float) else "not measured"
