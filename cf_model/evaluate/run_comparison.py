"""Two runs side by side: each system's means, their paired differences with intervals and verdicts, curves and videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import figures
from .cells import SUITES, refuse_other_protocols
from .figures import Line, Row, average_rows, draw_chart, wants_logarithm
from .page import Curves
from .report import ARROWS, Results, describe_metric, pair_results, state_verdict
from .statistics import RATIOS, correct_by_holm

# Choice: with fewer prompts an interval is too narrow to be believed, and even equal signs could be chance (p > 0.03).
FEWEST_PROMPTS = 6
COLOURS = {"A": "#3f83c9", "B": "#e0813a"}
SHOWN_PROMPTS = {"prompts": 4, "continuations": 2}  # whose videos are shown
SUITE_BYTES = 3_000_000  # bytes of one suite's videos, of each run
CLEAR = {"better": "good", "worse": "bad", "higher": "other", "lower": "other"}  # verdict on a clear difference -> its CSS class


def compare_suites(a: Results, b: Results) -> list[dict[str, Any]]:
    """Compare, for each suite, the systems of both runs: their metrics as B minus A over the videos that both have.

    ValueError if the runs measured a metric by different protocols.
    """
    refuse_other_protocols(a.protocols, b.protocols)
    rows: list[dict[str, Any]] = []
    for suite, title in SUITES.items():
        names = [list_systems(one, suite) for one in (a, b)]
        both = [name for name in names[0] if name in names[1]]
        systems = [compare_system(a, b, suite, name) for name in both]
        only = {letter: [name for name in some if name not in both] for letter, some in zip("AB", names, strict=True)}
        if systems or any(only.values()):
            differ = build_matrix([one for one in systems if not one["same"]])
            rows.append({"suite": suite, "title": title, "systems": systems, "only": only, "matrix": differ})
    # The family that Holm's correction counts: every test of the page, but not of numbers that are the same by construction.
    family = [row for suite in rows for one in suite["systems"] for row in one["rows"] if not row["same"] and row["found"].p >= 0]
    for row, p in zip(family, correct_by_holm([row["found"].p for row in family]), strict=True):
        row["p_family"] = p
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


def compare_metric(a: Results, b: Results, suite: str, system: str, metric: str) -> dict[str, Any] | None:
    """Compare a metric of a system: means, paired difference and verdict; None if a run lacks it."""
    first, second = (one.interval(suite, system, metric) for one in (a, b))
    if first is None or second is None:
        return None
    parts = [name for name in RATIOS.get(metric, ()) if (suite, system, name) in a.cells]  # of a ratio, the pairs that have both
    shared = set.intersection(*(set(one.cells.get((suite, system, part), {})) for one in (a, b) for part in parts or [metric]))
    # without a pair it is a metric of all videos together, or the runs have no video in common
    difference = pair_results((a, suite, system), (b, suite, system), metric)
    assert difference is not None  # because both have a mean
    change, word = difference.change, describe_metric(metric)
    # the same: pairs that are all equal, and equal numbers without pairs
    same = change.mean == 0 and (not change.has_ends or change.low == change.high == 0)
    few = change.has_ends and difference.prompts < FEWEST_PROMPTS
    says = "the same" if same else "too few prompts" if few else state_verdict(change, word.better)
    bar = None
    if change.has_ends and not same:
        reach = max(abs(change.low), abs(change.high), 1e-12)
        bar = {"low": 50 + 50 * change.low / reach, "high": 50 + 50 * change.high / reach}
    kind = "same" if same else CLEAR.get(says, "none")
    return {
        "metric": metric, "word": word, "arrow": ARROWS[word.better], "first": first, "second": second, "found": difference,
        "pairs": len(shared), "p_family": float("nan"), "says": says, "bar": bar, "same": same, "clear": says in CLEAR, "kind": kind,
    }  # fmt: skip


def list_compared(suites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List every compared metric as a plain row, from what `compare_suites` returns: means of both runs, and B minus A, paired.

    `low` and `high` are the 95 % interval of the difference over `prompts`; they and `p` are null where there is none.
    """
    rows = []
    for suite in suites:
        for one in suite["systems"]:
            for row in one["rows"]:
                found = row["found"]
                numbers = {"a": found.first, "b": found.second, "difference": found.change.mean, "low": found.change.low}
                numbers |= {"high": found.change.high, "p": found.p, "p_family": row["p_family"]}
                known = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
                place = {"suite": suite["suite"], "system": one["name"], "metric": row["metric"]}
                rows.append(place | known | {"prompts": found.prompts, "pairs": row["pairs"], "says": row["says"]})
    return rows


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


def list_differences(results: Results, first: str, second: str, shown: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return a row for each metric that two systems have: both means, and the paired difference with its interval and verdict.

    `shown`: suite -> metric -> whether down or up is better, or empty.
    """
    rows: list[dict[str, Any]] = []
    for suite, metrics in shown.items():
        for metric, better in metrics.items():
            if found := results.difference(suite, first, second, metric):
                change = found.change
                row = {"suite": suite, "metric": metric, second: found.second, first: found.first, "difference": change.mean}
                row["prompts"] = found.prompts
                ends = {"low": change.low, "high": change.high} if change.has_ends else {}
                rows.append(row | ends | {"says": state_verdict(change, better)})
    return rows


def compare_stage_metrics(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List the stages' metrics that differ; those of `evaluate` have tables of their own."""
    rows = []
    for name in [name for name in dict.fromkeys([*a, *b]) if name != "evaluate"]:
        one, other = a.get(name, {}), b.get(name, {})
        for key in dict.fromkeys([*one, *other]):
            x, y = one.get(key), other.get(key)
            if x != y:
                change = y - x if isinstance(x, int | float) and isinstance(y, int | float) else None
                rows.append({"stage": name, "key": key.replace("_", " "), "a": x, "b": y, "change": change})
    return rows


def draw_curves(one: Curves, other: Curves) -> list[dict[str, Any]]:
    """Draw the metrics over time of both: for each system whose curves differ, a chart for each metric."""
    systems: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in [key for key in one if key in other and str(one[key]) != str(other[key])]:
        curves = [Line(COLOURS["A"], *one[key]), Line(COLOURS["B"], *other[key])]
        systems.setdefault(key[:2], []).append({"title": describe_metric(key[2]).title, "svg": draw_chart(curves, x="seconds")})
    return [{"suite": SUITES.get(suite, suite), "system": name, "charts": charts} for (suite, name), charts in systems.items()]


def draw_training(a: Mapping[str, Sequence[Row]], b: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Draw running means of what each stage of both logged; stages with equal rows are only named."""
    stages, same = [], []
    for name in dict.fromkeys([*a, *b]):
        one, other = (list(rows.get(name, [])) for rows in (a, b))
        if one == other:
            same.append(name)
            continue
        charts = []
        for key in dict.fromkeys(key for row in [*one, *other] for key in row if key != "step"):
            means = [draw_running_mean(COLOURS[letter], rows, key) for letter, rows in (("A", one), ("B", other))]
            if drawn := [line for line in means if line]:
                log = wants_logarithm(np.concatenate([line.y for line in drawn]))
                charts.append({"title": key.replace("_", " "), "svg": draw_chart(drawn, x="step", log=log)})
        stages.append({"stage": name, "charts": charts})
    return {"stages": stages, "same": same}


def draw_running_mean(colour: str, rows: Sequence[Row], key: str) -> Line | None:
    """Return a value's running mean as a line; None for fewer than two numbers."""
    if (found := average_rows(rows, key)) is None:
        return None
    steps, _, mean = found
    return Line(colour, steps[-len(mean) :].tolist(), mean.tolist())


def embed_videos(index: Sequence[Sequence[Row]], a: Path, b: Path, measured: Sequence[Mapping[str, Any]], fps: int) -> list[dict[str, Any]]:
    """Embed, of each system that differs, the videos of A and B for the first prompts that both indices have, first seed.

    `a` and `b` are the folders of the videos; `measured` is what `compare_suites` returns.
    """
    suites = []
    for suite in SUITES:
        same = {one["name"] for part in measured if part["suite"] == suite for one in part["systems"] if one["same"]}
        items = [figures.group_by_item(rows, suite) for rows in index]
        shared = {key: {name: row for name, row in items[0][key].items() if name not in same} for key in items[0] if key in items[1]}
        rows = []
        for key in figures.fit_budget(shared, SHOWN_PROMPTS[suite], SUITE_BYTES, a):
            pairs = [embed_pair(name, items[0][key][name], items[1][key].get(name), a, b, fps) for name in shared[key] if name != "real"]
            first, real = next(iter(items[0][key].values())), items[0][key].get("real")
            prefix = max(row["prefix_frames"] for row in items[0][key].values()) / fps
            facts = {"prompt": first["prompt"], "seed": first["seed"], "prefix": prefix, "pairs": [one for one in pairs if one]}
            rows.append(facts | {"real": figures.embed_video(a / real["file"]) if real else None})
        rows = [row for row in rows if row["pairs"]]
        if rows:
            suites.append({"title": SUITES[suite], "rows": rows, "of": len(shared), "same": sorted(same)})
    return suites


def embed_pair(name: str, one: Mapping[str, Any], other: Mapping[str, Any] | None, a: Path, b: Path, fps: int) -> dict[str, Any] | None:
    """Embed a system's videos of both runs with their frame strips; None unless both have the video with that seed."""
    if other is None or one["seed"] != other["seed"]:
        return None
    files = [root / row["file"] for root, row in ((a, one), (b, other))]
    if not all(file.exists() for file in files):
        return None
    readable = [frames for file in files if (frames := figures.read_frames(file, round(figures.STRIP_SECONDS * fps))) is not None]
    strips = [figures.draw_strip(frames, figures.STRIP_HEIGHT) for frames in readable]
    return {"system": name, "sources": [figures.embed_video(file) for file in files], "strips": strips}
