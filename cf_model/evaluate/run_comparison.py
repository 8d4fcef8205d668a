"""Two runs' metrics side by side: each system's means, and their paired differences with intervals and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .report import ARROWS, SUITES, Results, describe_metric, state_verdict
from .statistics import Difference, paired, without_interval

# Choice: with fewer prompts an interval is too narrow to be believed, and even equal signs could be chance (p > 0.03).
FEWEST_PROMPTS = 6
CLEAR = {"better": "good", "worse": "bad", "higher": "other", "lower": "other"}  # verdict on a clear difference -> its CSS class


def compare_suites(a: Results, b: Results) -> list[dict[str, Any]]:
    """Compare, for each suite, the systems of both runs: their metrics as B minus A over the videos that both have."""
    rows = []
    for suite, title in SUITES.items():
        names = [list_systems(one, suite) for one in (a, b)]
        both = [name for name in names[0] if name in names[1]]
        systems = [compare_system(a, b, suite, name) for name in both]
        only = {letter: [name for name in some if name not in both] for letter, some in zip("AB", names, strict=True)}
        if systems or any(only.values()):
            differ = build_matrix([one for one in systems if not one["same"]])
            rows.append({"suite": suite, "title": title, "systems": systems, "only": only, "matrix": differ})
    return rows


def list_systems(one: Results, suite: str) -> list[str]:
    """List the systems of a suite without the real clips."""
    names = dict.fromkeys([system for s, system, _ in one.cells if s == suite] + list(one.means.get(suite, {})))
    return [name for name in names if name != "real"]


def compare_system(a: Results, b: Results, suite: str, name: str) -> dict[str, Any]:
    """Compare a system's metrics that both runs have; `clearly`: how many of them differ clearly."""
    metrics = [metric for metric in a.metrics(suite) if not metric.endswith("_videos") and metric != "videos"]
    rows = [row for metric in metrics if (row := compare_metric(a, b, suite, name, metric))]
    same = all(row["same"] for row in rows)
    return {"name": name, "rows": rows, "same": same, "clearly": sum(row["clear"] for row in rows)}


def compare_metric(a: Results, b: Results, suite: str, name: str, metric: str) -> dict[str, Any] | None:
    """Compare a metric of a system: means, paired difference and verdict; None if a run lacks it."""
    first, second = (one.interval(suite, name, metric) for one in (a, b))
    if first is None or second is None:
        return None
    x, y = (one.cells.get((suite, name, metric), {}) for one in (a, b))
    shared = x.keys() & y.keys()
    # without a pair it is a metric of all videos together, or the runs have no video in common
    unpaired = Difference(first.mean, second.mean, without_interval(second.mean - first.mean), float("nan"))
    difference = paired(x, y, resamples=a.resamples, seed=a.seed) or unpaired
    change, word = difference.change, describe_metric(metric)
    # the same: pairs that are all equal, and equal numbers without pairs
    same = change.mean == 0 and (not change.has_ends or change.low == change.high == 0)
    few = change.has_ends and len({prompt for prompt, _ in shared}) < FEWEST_PROMPTS
    says = "the same" if same else "too few prompts" if few else state_verdict(change, word.better)
    bar = None
    if change.has_ends and not same:
        reach = max(abs(change.low), abs(change.high), 1e-12)
        bar = {"low": 50 + 50 * change.low / reach, "high": 50 + 50 * change.high / reach}
    kind = "same" if same else CLEAR.get(says, "none")
    return {
        "metric": metric, "word": word, "arrow": ARROWS[word.better], "first": first, "second": second, "found": difference,
        "pairs": len(shared), "says": says, "bar": bar, "same": same, "clear": says in CLEAR, "kind": kind,
    }  # fmt: skip


def build_matrix(systems: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Build the overview: a row for each metric in the report's order, a cell for each system."""
    cells = {(row["metric"], one["name"]): row for one in systems for row in one["rows"]}
    heads = {row["metric"]: {"word": row["word"], "arrow": row["arrow"]} for one in systems for row in one["rows"]}
    return [heads[metric] | {"cells": [cells.get((metric, one["name"])) for one in systems]} for metric in heads]


def count_verdicts(suites: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the differences by verdict, and how many of them would look clear by chance alone."""
    rows = [row for suite in suites for one in suite["systems"] for row in one["rows"]]
    tested, says = sum(row["bar"] is not None and row["says"] != "too few prompts" for row in rows), Counter(row["says"] for row in rows)
    return {"of": len(rows), "says": says, "tested": tested, "by_chance": tested / 20, "few": FEWEST_PROMPTS}
