"""What the report shows of the filter's rules: how many clips are left after each, how their values lie, and the ones near a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 24
WIDTH, HEIGHT = 240, 60  # units of the drawing
BORDERLINE = 10  # clips that are named for each rule
SHOWN = 6  # clips of each reason, and of those that were accepted


def describe_rules(manifest: Sequence[Mapping[str, Any]], bounds: Mapping[str, tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Describe every rule that clips have values for; `bounds` are name, comparison and threshold by reason, in the order of the rules."""
    rules, left = [], sum(row["reason"] != "unreadable" for row in manifest)
    for reason, (name, comparison, bound) in bounds.items():
        rows = [row for row in manifest if reason in (row.get("values") or {})]
        broken = sum(row["reason"] == reason for row in manifest)
        left -= broken
        if not rows:
            continue
        near = sorted(rows, key=lambda row: (abs(row["values"][reason] - bound), row["id"]))[:BORDERLINE]
        rules.append(
            {
                "reason": reason,
                "rule": f"{name} {comparison} {bound:g}",
                "broken": broken,
                "left": left,
                "svg": draw_histogram([row["values"][reason] for row in rows], bound),
                "near": [
                    {"id": row["id"], "clip": row.get("source") or row["id"], "value": row["values"][reason], "kept": row["kept"]}
                    for row in near
                ],
            }
        )
    return rules


def count_bins(values: Sequence[float], bound: float) -> tuple[np.ndarray, float, float]:
    """Count values in BINS equal steps that reach from the lowest to the highest of values and threshold: counts, lowest, span."""
    low, high = min(*values, bound), max(*values, bound)
    span = (high - low) or 1.0
    return np.histogram(values, BINS, (low, low + span))[0], low, span


def list_bins(manifest: Sequence[Mapping[str, Any]], bounds: Mapping[str, tuple[str, str, float]]) -> list[list[Any]]:
    """Return the rows of rules.csv, after a line of names: each rule's histogram and threshold, for `dvc plots`."""
    rows: list[list[Any]] = [["rule", "low", "high", "clips", "threshold"]]
    for reason, (_, _, bound) in bounds.items():
        if values := [row["values"][reason] for row in manifest if reason in (row.get("values") or {})]:
            counts, low, span = count_bins(values, bound)
            ends = [float(f"{low + span * k / BINS:.6g}") for k in range(BINS + 1)]
            rows += [[reason, ends[k], ends[k + 1], int(count), bound] for k, count in enumerate(counts)]
    return rows


def draw_histogram(values: Sequence[float], bound: float) -> str:
    """Draw how values lie, with the threshold as a line; the same values give the same text."""
    counts, low, _ = count_bins(values, bound)
    high = max(*values, bound)
    step = WIDTH / BINS
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{HEIGHT * (1 - count / counts.max()):.1f}" width="{step - 1:.1f}" '
        f'height="{HEIGHT * count / counts.max():.1f}" fill="currentColor" opacity="0.45"/>'
        for k, count in enumerate(counts)
        if count
    )
    return frame_bars(bars, low, high, bound, width=WIDTH, height=HEIGHT)


def frame_bars(bars: str, low: float, high: float, bound: float, *, width: int, height: int) -> str:
    """Return a drawing of bars over the values from `low` to `high`, with both ends written below and the threshold as a line."""
    at = width * (bound - low) / ((high - low) or 1.0)
    line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}" stroke="#d33" stroke-width="1.5"/>'
    ends = f'<text x="0" y="{height + 11}">{low:.3g}</text><text x="{width}" y="{height + 11}" text-anchor="end">{high:.3g}</text>'
    return f'<svg viewBox="0 0 {width} {height + 14}" font-size="9" fill="currentColor">{bars}{line}{ends}</svg>'


def sort_by_fate(manifest: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the first SHOWN clips of each fate: accepted, then the reasons in the order of how many clips they rejected."""
    fates: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest:
        fates.setdefault("accepted" if row["kept"] else row["reason"], []).append(row)
    order = sorted(fates, key=lambda fate: (fate != "accepted", -len(fates[fate]), fate))
    return {fate: fates[fate][:SHOWN] for fate in order}


def select_pictured(rules: Sequence[Mapping[str, Any]], fates: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[str]:
    """Return the ids of the clips that need a picture: the first of each fate, and those nearest to each threshold."""
    return {row["id"] for fate in fates.values() for row in fate} | {near["id"] for rule in rules for near in rule["near"]}
