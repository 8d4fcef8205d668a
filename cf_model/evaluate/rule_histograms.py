"""What the report shows of the filter's rules: how many clips are left after each, how their values lie, and the ones near a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 24
WIDTH, HEIGHT = 240, 60  # units of the drawing
BORDERLINE = 10  # clips that are named for each rule


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
                "near": [{"clip": row.get("source") or row["id"], "value": row["values"][reason], "kept": row["kept"]} for row in near],
            }
        )
    return rules


def draw_histogram(values: Sequence[float], bound: float) -> str:
    """Draw how values lie, with the threshold as a line; the same values give the same text."""
    low, high = min(*values, bound), max(*values, bound)
    span = (high - low) or 1.0
    counts, _ = np.histogram(values, BINS, (low, low + span))
    step = WIDTH / BINS
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{HEIGHT * (1 - count / counts.max()):.1f}" width="{step - 1:.1f}" '
        f'height="{HEIGHT * count / counts.max():.1f}" fill="currentColor" opacity="0.45"/>'
        for k, count in enumerate(counts)
        if count
    )
    at = WIDTH * (bound - low) / span
    line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}" stroke="#d33" stroke-width="1.5"/>'
    ends = f'<text x="0" y="{HEIGHT + 11}">{low:.3g}</text><text x="{WIDTH}" y="{HEIGHT + 11}" text-anchor="end">{high:.3g}</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 14}" font-size="9" fill="currentColor">{bars}{line}{ends}</svg>'
