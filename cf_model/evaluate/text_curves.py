"""Curves as lines of text."""

from __future__ import annotations

from collections.abc import Sequence


def average_neighbours(values: Sequence[float | None], width: int) -> list[float | None]:
    """Average neighbouring values to at most `width` means; a mean is None where none of its values was measured."""
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    measured = [[value for value in part if value is not None] for part in parts]
    return [sum(part) / len(part) if part else None for part in measured]


def draw_line(means: Sequence[float | None], ramp: str) -> str:
    """Return a character for each mean, by its height between the lowest and the highest; a space for None."""
    measured = [mean for mean in means if mean is not None]
    low, size = min(measured), max(measured) - min(measured)
    steps = [None if mean is None else round((mean - low) / size * (len(ramp) - 1)) if size else 0 for mean in means]
    return "".join(" " if step is None else ramp[step] for step in steps)
