"""Means over videos of the cells that a folder's scores consist of, and the totals that may be made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cf_model.metrics import long, totals
from cf_model.metrics.protocols import COMPETITION, VBENCH


def average_cells(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Average cells over videos: protocol -> metric -> {mean, videos}. Cells that failed are counted as `failed` beside them.

    What a protocol's own code averages differently is averaged so: consistency of `vbench` over frames, VBench-Long's upstream
    variant and the competition track over clips.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.get("metric"):
            groups.setdefault((cell["protocol"], cell["metric"]), []).append(cell)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for (protocol, metric), rows in groups.items():
        good = [row for row in rows if row.get("value") is not None]
        entry = {"videos": float(len(good))}
        if len(good) < len(rows):
            entry["failed"] = float(len(rows) - len(good))
        if good:
            weights = [weigh_video(row) for row in good]
            entry["mean"] = float(np.average([float(row["value"]) for row in good], weights=weights))
        out.setdefault(protocol, {})[metric] = entry
    return out


def weigh_video(cell: Mapping[str, Any]) -> float:
    """Return how much a cell counts in its metric's mean over videos: the same as all, its pairs of frames, or its clips.

    Pairs of frames are VBench's weights of consistency on one GPU; on several it takes the plain mean, which is the same only for videos
    of equal length.
    """
    protocol, metric = cell["protocol"], cell["metric"].partition("@")[0]
    if protocol == VBENCH and metric in ("subject_consistency", "background_consistency"):
        return float(cell["frames"] - 1)
    return float(len(cell["clips"])) if protocol in (long.UPSTREAM, COMPETITION) else 1.0


def total_scores(means: Mapping[str, Mapping[str, Mapping[str, float]]], failed: int) -> dict[str, float | str]:
    """Return VBench's totals and the competition's aggregates, each a number in percent or the sentence that says why there is none.

    `failed` counts videos that could not be scored: a total of the others would be of another set of prompts.
    """
    out: dict[str, float | str] = {}

    def add(name: str, protocol: str, compute: Any) -> None:
        entries = means.get(protocol, {})
        scores = {metric: entry["mean"] for metric, entry in entries.items() if "mean" in entry and "failed" not in entry}
        try:
            if failed:
                raise ValueError(f"{failed} of the videos could not be scored; mend or remove them, and score the folder again")
            out[name] = 100 * compute(scores)
        except ValueError as error:
            out[name] = str(error)

    for protocol in (VBENCH, long.UPSTREAM, long.FIXED):
        if protocol in means:
            add(f"{protocol}/total", protocol, lambda scores: totals.compute_totals(scores).total)
    if COMPETITION in means:
        for aggregate in totals.COMPETITION:
            add(f"{COMPETITION}/{aggregate}", COMPETITION, lambda scores, which=aggregate: totals.compute_competition(scores, which))
    return out
