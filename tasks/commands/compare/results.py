"""What two runs made, side by side: numbers with paired intervals, curves, videos. tasks/commands/compare/page.py puts it on a page."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cf_model.evaluate.figures import (
    STRIP_SECONDS,
    Line,
    draw_chart,
    draw_strip,
    embed_video,
    fit_budget,
    group_by_item,
    item_key,
    read_strip_frames,
)
from cf_model.evaluate.report import ARROWS, Results, describe_metric, state_verdict
from cf_model.evaluate.statistics import Difference, paired, without_interval
from tasks.params.yaml_file import Refused

__all__ = ["number"]
Row = dict[str, Any]

SUITES = {"prompts": "Videos from a prompt", "continuations": "Continuations of a real prefix"}
PROMPTS = {"prompts": 4, "continuations": 2}  # whose videos are shown
FEW = 6  # prompts. Choice: below that an interval is too narrow to be believed, and even equal signs could be chance (p > 0.03)
BUDGET = 3_000_000  # bytes of one suite's videos, of each run
TALL = 64  # pixels of a strip's frames


def lines(path: Path) -> list[Row]:
    return [parsed(line, path) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def metrics(path: Path) -> Row:
    return parsed(path.read_text(), path) if path.exists() else {}


def parsed(text: str, path: Path) -> Row:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Refused(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{path} is damaged: {text.strip()[:50]} has no names")
    return found


def results(root: Path, resamples: int, seed: int) -> Results:
    cells: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for row in lines(root / "results/cells.jsonl"):
        if row["value"] is not None:
            cells.setdefault((row["suite"], row["system"], row["metric"]), {})[item_key(row), row["seed"]] = row["value"]
    means = metrics(root / "metrics/evaluate.json")
    kept = {suite: {name: v for name, v in systems.items() if isinstance(v, dict)} for suite, systems in means.items() if suite in SUITES}
    return Results(cells, kept, resamples=resamples, seed=seed)


# --------------------------------------------------------------------------------------------------------- numbers


def suites(a: Results, b: Results) -> list[dict[str, Any]]:
    """For each suite the systems of both runs; for each system its metrics, B minus A over the videos both have."""
    found = []
    for suite, title in SUITES.items():
        here = [systems_of(one, suite) for one in (a, b)]
        both = [name for name in here[0] if name in here[1]]
        systems = [system(a, b, suite, name) for name in both]
        only = {letter: [name for name in mine if name not in both] for letter, mine in zip("AB", here, strict=True)}
        if systems or any(only.values()):
            differ = matrix([one for one in systems if not one["same"]])
            found.append({"suite": suite, "title": title, "systems": systems, "only": only, "matrix": differ})
    return found


def systems_of(one: Results, suite: str) -> list[str]:
    names = dict.fromkeys([system for s, system, _ in one.cells if s == suite] + list(one.means.get(suite, {})))
    return [name for name in names if name != "real"]


def system(a: Results, b: Results, suite: str, name: str) -> dict[str, Any]:
    metrics = [metric for metric in a.metrics(suite) if not metric.endswith("_videos") and metric != "videos"]
    rows = [row for metric in metrics if (row := one_metric(a, b, suite, name, metric))]
    same = all(row["same"] for row in rows)
    return {"name": name, "rows": rows, "same": same, "clearly": sum(row["clear"] for row in rows)}


def one_metric(a: Results, b: Results, suite: str, name: str, metric: str) -> dict[str, Any] | None:
    first, second = (one.interval(suite, name, metric) for one in (a, b))
    if first is None or second is None:
        return None
    x, y = (one.cells.get((suite, name, metric), {}) for one in (a, b))
    found = paired(x, y, resamples=a.resamples, seed=a.seed)
    shared = len(x.keys() & y.keys())
    if found is None:  # only a whole system has it, or no video is the same one
        found = Difference(first.mean, second.mean, without_interval(second.mean - first.mean), float("nan"))
    # of pairs that are all equal, and of equal numbers without pairs
    same = found.change.mean == 0 and (not found.change.has_ends or found.change.low == found.change.high == 0)
    prompts = len({prompt for prompt, _ in x.keys() & y.keys()})
    few = found.change.has_ends and prompts < FEW
    says = "the same" if same else "too few prompts" if few else state_verdict(found.change, describe_metric(metric).better)
    known = found.change.has_ends and not same
    reach = max(abs(found.change.low), abs(found.change.high), 1e-12) if known else 1.0
    bar = {"low": 50 + 50 * found.change.low / reach, "high": 50 + 50 * found.change.high / reach} if known else None
    clear = says in ("better", "worse", "higher", "lower")
    return {
        "metric": metric, "word": describe_metric(metric), "arrow": ARROWS[describe_metric(metric).better], "first": first, "second": second,
        "found": found, "pairs": shared, "says": says, "bar": bar, "same": same, "clear": clear, "kind": kind(says),
    }  # fmt: skip


def kind(says: str) -> str:
    return {"better": "good", "worse": "bad", "higher": "other", "lower": "other", "the same": "same"}.get(says, "none")


def matrix(systems: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metric by system, in the report's order: where to look first."""
    cells = {(row["metric"], one["name"]): row for one in systems for row in one["rows"]}
    metrics = list(dict.fromkeys(row["metric"] for one in systems for row in one["rows"]))
    rows = []
    for metric in metrics:
        found = [cells.get((metric, one["name"])) for one in systems]
        rows.append({"word": describe_metric(metric), "arrow": ARROWS[describe_metric(metric).better], "cells": found})
    return rows


def tally(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many differences there are, and how many of them chance alone would call clear."""
    rows = [row for suite in found for one in suite["systems"] for row in one["rows"]]
    tested = sum(row["bar"] is not None and row["says"] != "too few prompts" for row in rows)
    return {"of": len(rows), "says": Counter(row["says"] for row in rows), "tested": tested, "by_chance": tested / 20, "few": FEW}


# ---------------------------------------------------------------------------------------------------------- curves


def over_time(a: Path, b: Path, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """results/curves.csv of both: for each system whose curves differ, a chart for each metric."""
    one, other = curves(a / "results/curves.csv"), curves(b / "results/curves.csv")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in [key for key in one if key in other and str(one[key]) != str(other[key])]:
        drawn = [Line(colours[letter], *np.array(sorted(rows)).T.tolist()) for letter, rows in (("A", one[key]), ("B", other[key]))]
        found.setdefault(key[:2], []).append({"title": describe_metric(key[2]).title, "svg": draw_chart(drawn, x="seconds")})
    return [{"suite": SUITES.get(suite, suite), "system": name, "charts": charts} for (suite, name), charts in found.items()]


def curves(path: Path) -> dict[tuple[str, str, str], list[list[float]]]:
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # numpy sorts out what was not measured
                values = [float(row[name]) if row[name] else float("nan") for name in ("second", "mean", "low", "high")]
                found.setdefault((row["suite"], row["system"], row["metric"]), []).append(values)
    return found


def training(a: Path, b: Path, colours: Mapping[str, str]) -> dict[str, Any]:
    """Running means of models/<stage>/metrics.jsonl of both; stages that were trained in the same way are only named."""
    stages, same = [], []
    for name in dict.fromkeys(path.parent.name for root in (a, b) for path in sorted(root.glob("models/*/metrics.jsonl"))):
        one, other = (lines(root / "models" / name / "metrics.jsonl") for root in (a, b))
        if one == other:
            same.append(name)
            continue
        charts = []
        for key in dict.fromkeys(key for row in [*one, *other] for key in row if key != "step"):
            drawn = [running(colours[letter], rows, key) for letter, rows in (("A", one), ("B", other))]
            kept = [line for line in drawn if line]
            if kept:
                values = np.concatenate([line.y for line in kept])
                log = bool((values > 0).all() and values.max() > 50 * values.min())
                charts.append({"title": key.replace("_", " "), "svg": draw_chart(kept, x="step", log=log)})
        stages.append({"stage": name, "charts": charts})
    return {"stages": stages, "same": same}


def running(colour: str, rows: Sequence[Row], key: str) -> Line | None:
    pairs = np.array([(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)], float)
    if len(pairs) < 2:
        return None
    width = max(1, len(pairs) // 20)
    mean = np.convolve(pairs[:, 1], np.ones(width) / width, "valid")
    return Line(colour, pairs[width - 1 :, 0].tolist(), mean.tolist())


# ---------------------------------------------------------------------------------------------------------- videos


def videos(a: Path, b: Path, measured: Sequence[Mapping[str, Any]], fps: int) -> list[dict[str, Any]]:
    """The first prompts of the index that both have, first seed: of each system that differs, A and B one beside the other."""
    index = [lines(root / "samples/index.jsonl") for root in (a, b)]
    found = []
    for suite in SUITES:
        same = {one["name"] for part in measured if part["suite"] == suite for one in part["systems"] if one["same"]}
        items = [group_by_item(rows, suite) for rows in index]
        shared = {key: {name: row for name, row in items[0][key].items() if name not in same} for key in items[0] if key in items[1]}
        rows = []
        for key in fit_budget(shared, PROMPTS[suite], BUDGET, a / "samples"):
            pairs = [pair(name, items[0][key][name], items[1][key].get(name), a, b, fps) for name in shared[key] if name != "real"]
            first, real = next(iter(items[0][key].values())), items[0][key].get("real")
            prefix = max(row["prefix_frames"] for row in items[0][key].values()) / fps
            about = {"prompt": first["prompt"], "seed": first["seed"], "prefix": prefix, "pairs": [one for one in pairs if one]}
            rows.append(about | {"real": embed_video(a / "samples" / real["file"]) if real else None})
        rows = [row for row in rows if row["pairs"]]
        if rows:
            found.append({"title": SUITES[suite], "rows": rows, "of": len(shared), "same": sorted(same)})
    return found


def pair(name: str, one: Mapping[str, Any], other: Mapping[str, Any] | None, a: Path, b: Path, fps: int) -> dict[str, Any] | None:
    if other is None or one["seed"] != other["seed"]:
        return None
    files = [root / "samples" / row["file"] for root, row in ((a, one), (b, other))]
    if not all(file.exists() for file in files):
        return None
    taken = [read_strip_frames(file, fps) for file in files]
    strips = [draw_strip(frames, TALL) for frames in taken if frames is not None]
    times = [STRIP_SECONDS * k for k in range(max(len(frames) for frames in taken if frames is not None))]
    return {"system": name, "sources": [embed_video(file) for file in files], "strips": strips, "times": times}
