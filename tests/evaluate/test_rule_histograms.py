"""The rules' part of the report's page."""

from __future__ import annotations

import re

from cf_model.evaluate.rule_histograms import BORDERLINE, WIDTH, describe_rules, draw_histogram

BOUNDS = {"too_short": ("seconds", ">", 10.0), "frozen": ("motion", ">=", 0.5), "duplicate": ("distance", ">=", 8.0)}


def row(number: int, reason: str | None, **values: float) -> dict[str, object]:
    return {"id": f"clip-{number:02d}", "kept": reason is None, "reason": reason, "values": values}


def test_the_funnel_counts_down_and_the_nearest_are_named() -> None:
    manifest = [row(k, None, too_short=11.0 + k, frozen=1.0 + k) for k in range(20)]
    manifest += [row(20, "too_short", too_short=9.0, frozen=3.0), row(21, "frozen", too_short=12.0, frozen=0.4), row(22, "unreadable")]
    manifest.append(row(23, "frozen", frozen=0.1, too_short=40.0) | {"source": "raw/<b>.mp4"})
    short, frozen = describe_rules(manifest, BOUNDS)
    assert [(rule["broken"], rule["left"]) for rule in (short, frozen)] == [(1, 22), (2, 20)]
    assert short["rule"] == "seconds > 10" and len(short["near"]) == BORDERLINE
    assert frozen["near"][0] == {"id": "clip-21", "clip": "clip-21", "value": 0.4, "kept": False}
    assert frozen["near"][1]["clip"] == "raw/<b>.mp4" and "<b>" not in frozen["svg"]


def test_the_threshold_stands_where_it_is_and_bars_count_the_values() -> None:
    svg = draw_histogram([0.0, 0.0, 0.0, 4.0], 1.0)
    assert float(re.search(r'<line x1="([\d.]+)"', svg)[1]) == WIDTH / 4  # type: ignore[index]
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"', svg)]
    assert sorted(heights) == [20.0, 60.0]
    assert draw_histogram([2.0, 2.0], 2.0).count("<rect") == 1
