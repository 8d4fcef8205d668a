"""What `make repro` ends with: where to look, and five lines of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# label -> where in metrics/ the number stands
METRICS = {
    "base, sprite recall": ("evaluate", "prompts", "base", "sprite_recall"),
    "stage1, sprite recall": ("evaluate", "prompts", "stage1", "sprite_recall"),
    "teacher, map error after 10 real seconds": ("evaluate", "continuations", "teacher_slow_fast", "map_error"),
    "stage2, memory ratio (0 remembers all)": ("evaluate", "prompts", "stage2", "memory_ratio"),
    "stage2, diversity between its videos": ("evaluate", "prompts", "stage2", "diversity"),
}


def read_metric(metrics: Path, stage: str, *keys: str) -> str:
    file = metrics / f"{stage}.json"
    value: Any = json.loads(file.read_text()) if file.exists() else None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return f"{value:.4g}" if isinstance(value, int | float) else "not measured"


def summarize_run(root: Path) -> str:
    places = {"report": root / "reports/report.html", "videos": root / "samples"}
    lines = [f"{name:<42} {path}" for name, path in places.items() if path.exists()]
    lines += [f"{label:<42} {read_metric(root / 'metrics', *where)}" for label, where in METRICS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summarize_run(Path.cwd()))
