"""Tonight's clips against the training set: which of the filter's values moved, and which rules reject another share than before.

Accepted clips are compared with the clips that were accepted before, because both passed the same rules; what the rules take away is
compared by the shares of all clips, readable or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from scipy.stats import fisher_exact, ks_2samp

from .rule_histograms import BINS, frame_bars
from .statistics import correct_by_holm

CHANCE = 0.01  # that any finding of a night is named though nothing has changed (Holm over all findings)
LEAST_MOVED = 0.25  # of the largest distance between the distribution functions, and of shares; less is significant only in large sets
FEWEST = 5  # clips on either side; of fewer nothing can be said
WIDTH, HEIGHT = 320, 70  # pixels of a drawing
Row = Mapping[str, Any]


def compare_clips(manifest: Sequence[Row], new: set[str], bounds: Mapping[str, tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Return a finding for each rule's values, and one for each reason's share of rejected clips, those that moved most first.

    `new` are tonight's files, as the column `source` of the manifest has them; `bounds` are name, comparison and threshold by reason.
    """
    tonight = [row for row in manifest if row.get("source") in new]
    before = [row for row in manifest if row.get("source") not in new]
    findings = []
    for reason, (name, _, bound) in bounds.items():
        values, training = (
            [float(row["values"][reason]) for row in rows if row["kept"] and reason in (row.get("values") or {})]
            for rows in (tonight, before)
        )
        if min(len(values), len(training)) >= FEWEST:
            test = ks_2samp(values, training)
            about = f"the median {name} is {np.median(values):.4g}, and {np.median(training):.4g} in the training set"
            findings.append(_describe(reason, "values", about, test.statistic, test.pvalue) | {"svg": draw_pair(values, training, bound)})
    for reason in sorted({row["reason"] for row in manifest if row["reason"]}):
        if min(len(tonight), len(before)) >= FEWEST:
            counts = [sum(row["reason"] == reason for row in rows) for rows in (tonight, before)]
            shares = [count / len(rows) for count, rows in zip(counts, (tonight, before), strict=True)]
            table = [[count, len(rows) - count] for count, rows in zip(counts, (tonight, before), strict=True)]
            about = f"{shares[0]:.0%} of tonight's clips are rejected for it, and {shares[1]:.0%} of those before"
            findings.append(_describe(reason, "rejections", about, abs(shares[0] - shares[1]), fisher_exact(table)[1]))
    return mark_drift(findings)


def _describe(reason: str, what: str, about: str, moved: float, chance: float) -> dict[str, Any]:
    return {"reason": reason, "what": what, "about": about, "moved": round(float(moved), 4), "p": float(chance), "svg": ""}


def mark_drift(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `drifted` to each finding: moved by LEAST_MOVED at least, and by no chance, at level CHANCE over all findings (Holm)."""
    for finding, chance in zip(findings, correct_by_holm([one["p"] for one in findings]), strict=True):
        finding["drifted"] = bool(chance <= CHANCE and finding["moved"] >= LEAST_MOVED)
    return sorted(findings, key=lambda one: (-one["drifted"], -one["moved"], one["reason"]))


def say_drift(findings: Sequence[Row], clips: int) -> str:
    """Say in one sentence which rules moved."""
    moved = [f"{one['reason']} ({one['about']})" for one in findings if one["drifted"]]
    if moved:
        return f"tonight's {clips} clips differ from the training set: {'; '.join(moved)}"
    if not findings:
        return f"{clips} clips tonight: too few on one side to compare them with the training set, which takes {FEWEST}"
    return f"tonight's {clips} clips are like the training set by all {len(findings)} comparisons"


def draw_pair(values: Sequence[float], training: Sequence[float], bound: float) -> str:
    """Draw how both sets lie, as shares of each, with the threshold as a line: the training set grey, tonight's clips blue."""
    low, high = min(*values, *training, bound), max(*values, *training, bound)
    span = (high - low) or 1.0
    shares = [np.histogram(one, BINS, (low, low + span))[0] / len(one) for one in (training, values)]
    most, step = max(share.max() for share in shares), WIDTH / BINS
    bars = "".join(
        f'<rect x="{k * step + 1 + 5 * which:.1f}" y="{HEIGHT * (1 - share / most):.1f}" width="5" height="{HEIGHT * share / most:.1f}" '
        f'fill="{("#999", "#2f6fb3")[which]}"/>'
        for which, one in enumerate(shares)
        for k, share in enumerate(one)
        if share
    )
    return frame_bars(bars, low, high, bound, width=WIDTH, height=HEIGHT)


def draw_page(findings: Sequence[Row], sentence: str) -> str:
    """Return the page in HTML."""
    rows = "".join(
        f"<tr class='{'drifted' if one['drifted'] else ''}'><th>{escape(one['reason'])}</th><td>{one['what']}</td>"
        f"<td>{one['moved']:.2f}</td><td>{one['p']:.2g}</td><td>{escape(one['about'])}</td><td>{one['svg']}</td></tr>"
        for one in findings
    )
    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:80rem}"
        "h1{font-size:1.5rem;line-height:1.25}div{overflow-x:auto}"
        f"svg{{width:{WIDTH}px}}"
        "th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;min-width:4rem;border-bottom:1px solid #8884}"
        ".drifted th{color:#d33}"
    )
    heads = "".join(f"<th>{head}</th>" for head in ("rule", "of", "moved", "p", "", "grey: training set; blue: tonight; red: threshold"))
    note = (
        "<p>moved: largest distance of the distribution functions (Kolmogorov and Smirnov), or difference of the shares (Fisher). "
        f"Red is what moved by {LEAST_MOVED:g} and by a chance of at most {CHANCE:g} over all rows.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Drift of the clips</title><style>{style}</style></head>"
        f"<body><h1>{escape(sentence)}</h1>{note}<div><table><tr>{heads}</tr>{rows}</table></div></body></html>\n"
    )
