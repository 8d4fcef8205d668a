"""The few numbers by which a run is told at once: what `cf repro` ends with, and what a run's metrics in Prefect begin with."""

from pathlib import Path
from typing import Any

from tasks.files.json_lines import read_json_object

KEY_NUMBERS = {  # label -> stage whose metrics/<stage>.json has the number, and the keys to it
    "base, sprite recall": ("evaluate", "prompts", "base", "sprite_recall"),
    "stage1, sprite recall": ("evaluate", "prompts", "stage1", "sprite_recall"),
    "teacher, map error after 10 real seconds": ("evaluate", "continuations", "teacher_slow_fast", "map_error"),
    "stage2, memory ratio (0 remembers all)": ("evaluate", "prompts", "stage2", "memory_ratio"),
    "stage2, diversity between its videos": ("evaluate", "prompts", "stage2", "diversity"),
}


def read_key_numbers(root: Path) -> dict[str, float | None]:
    """Return the key numbers of a project's metrics by their labels; None where no stage has written one."""
    numbers: dict[str, float | None] = {}
    for label, (stage, *keys) in KEY_NUMBERS.items():
        value: Any = read_json_object(root / f"metrics/{stage}.json")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        numbers[label] = value if isinstance(value, int | float) else None
    return numbers
