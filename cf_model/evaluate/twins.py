"""Twins of Context Forcing's Tables 1 to 3: published rows, and beside them what was measured here, each by its own name.

A measured number stands in a column only if it has that column's metric and its videos have that column's length. A number of a
substitute network gets a row of its own that names the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .published import OURS, PublishedNumber, list_published
from .report import Results, format_number
from .statistics import Interval, without_interval

PAPER = "context-forcing"
TITLES = {
    "1": "Consistency in windows of long videos",
    "2": "VBench at 5 s and at 60 s",
    "3": "Ablations, at 60 s",
}
ABBREVIATED = {
    "context_length": "context, s",
    "parameters_billion": "parameters, billion",
    "frames_a_second": "frames a second",
    "background_consistency": "background consistency",
    "subject_consistency": "subject consistency",
    "dynamic_degree": "dynamic degree",
}
TOLERANCE = 0.75  # seconds by which videos may be shorter or longer than a column's: 81 frames at 16 fps are 5.06 s
SUITE = "prompts"

Column = tuple[str, int | None]  # metric, seconds of the videos; windows state their second in the metric's name
Recompute = Callable[[float, float, float], float | None]  # quality, semantic and total as printed -> the total that they give


def build_twins(
    results: Results, systems: Sequence[str], contexts: Mapping[str, float], seconds: Mapping[str, float], recompute: Recompute
) -> list[dict[str, Any]]:
    """Build the tables: columns, published rows, measured rows and notes.

    `contexts`: seconds of frames that a pass of a system attends to; `seconds`: how long a system's videos are.
    """
    twins = []
    for table, title in TITLES.items():
        numbers = [one for one in list_published() if (one.paper, one.table) == (PAPER, table)]
        columns = list(dict.fromkeys(locate_column(one) for one in numbers))
        rows: dict[str, dict[Column, float]] = {}
        for one in numbers:
            rows.setdefault(one.system, {})[locate_column(one)] = one.value
        measured = [row for system in systems for row in measure_rows(results, system, columns, contexts, seconds)]
        notes = [note for system, values in rows.items() for note in check_totals(system, values, recompute)]
        twins.append(
            {
                "table": table,
                "title": title,
                "citation": numbers[0].citation,
                "columns": [name_column(column) for column in columns],
                "published": [
                    {"name": name, "ours": name == OURS, "cells": [print_number(c, values.get(c)) for c in columns]}
                    for name, values in rows.items()
                ],
                "measured": measured,
                "notes": notes,
            }
        )
    return twins


def locate_column(one: PublishedNumber) -> Column:
    """Return the column of a number. Table 1 has columns of 60 s videos; the teacher's row, of 10 s videos, stands in them as printed."""
    windowed = one.protocol == "windows" or one.seconds is None
    return one.metric, None if windowed else 60 if one.table == "1" else one.seconds


def name_column(column: Column) -> str:
    """Return a column's head."""
    metric, seconds = column
    for begin, title in (("dinov2_", "DINOv2"), ("clip_f_", "CLIP-F"), ("clip_t_", "CLIP-T")):
        if metric.startswith(begin):
            return f"{title} {metric.removeprefix(begin).removesuffix('s')} s"
    return ABBREVIATED.get(metric, metric) + (f", {seconds} s" if seconds else "")


def print_number(column: Column, value: float | None) -> str | None:
    """Return a published number as the paper prints it: scores with two decimals, a context length of 20 as 20+."""
    if value is None or column[0] in ("parameters_billion", "frames_a_second", "context_length"):
        return None if value is None else "20+" if (column[0], value) == ("context_length", 20) else f"{value:g}"
    return f"{value:.2f}"


def measure_rows(
    results: Results, system: str, columns: Sequence[Column], contexts: Mapping[str, float], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a system's rows of a table: one for each network that a column's metric was measured with, the papers' own first."""
    names = [metric for suite, name, metric in results.cells if (suite, name) == (SUITE, system)]
    rows = []
    for suffix in sorted({metric.partition("@")[2] for metric in names}):
        cells: list[Interval | None] = []
        for metric, length in columns:
            own = f"{metric}@{suffix}" if suffix else metric
            fits = length is None or abs(seconds.get(system, 0) - length) <= TOLERANCE
            found = results.interval(SUITE, system, own) if fits and own in names else None
            scale = 100 if length else 1  # VBench's dimensions are in 0..1, windows in percent
            cells.append(Interval(*(scale * value for value in found)) if found else None)
        if any(cells):
            if system in contexts and ("context_length", None) in columns:
                cells[columns.index(("context_length", None))] = without_interval(contexts[system])
            count = max(len(results.cells[SUITE, system, metric]) for metric in names)
            rows.append({"system": system, "network": suffix, "cells": cells, "videos": count})
    return rows


def check_totals(system: str, values: Mapping[Column, float], recompute: Recompute) -> list[str]:
    """Return a sentence for each printed total that its quality and semantic scores contradict."""
    notes = []
    for seconds in {length for metric, length in values if metric == "total"}:
        parts = [values.get((metric, seconds)) for metric in ("quality", "semantic", "total")]
        quality, semantic, total = parts
        if quality is None or semantic is None or total is None:
            continue
        if computed := recompute(quality, semantic, total):
            notes.append(f"{system}, {seconds} s: printed total {format_number(total)}, but {quality} and {semantic} give {computed}")
    return notes
