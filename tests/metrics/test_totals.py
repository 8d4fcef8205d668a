"""Totals and aggregates against the numbers that the papers print, and their refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cf_model.metrics import totals

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden/eval/published.json").read_text())
ROUNDED = 0.0101  # of two decimals in the sum and in what is summed


@pytest.mark.parametrize("row", PUBLISHED["self-forcing++"])
def test_table_7_gives_tables_1_and_2(row: str) -> None:
    printed = dict(zip(PUBLISHED["columns"], PUBLISHED["self-forcing++"][row], strict=True))
    for aggregate in totals.COMPETITION:
        assert totals.compute_competition(printed, aggregate) == pytest.approx(printed[aggregate], abs=ROUNDED), aggregate


def test_printed_totals_follow_from_their_columns_but_for_four() -> None:
    found = {}
    for table in ("context-forcing 5 s", "context-forcing 60 s"):
        for system, (total, quality, semantic) in PUBLISHED[table].items():
            computed = totals.recompute_printed_total(quality, semantic, total)
            if computed is not None:
                found[table, system] = computed
    assert found == {("context-forcing 60 s", system): total for system, total in PUBLISHED["contradicted 60 s"].items()}
    assert found["context-forcing 60 s", "Ours"] == 82.06  # printed: 82.45


def every_dimension() -> dict[str, float]:
    return {name: 0.5 for name in totals.QUALITY | totals.SEMANTIC}


@pytest.mark.parametrize("name", totals.QUALITY | totals.SEMANTIC)
def test_a_total_without_one_of_its_dimensions_is_refused(name: str) -> None:
    scores = every_dimension()
    totals.compute_totals(scores)
    for broken in ({one: value for one, value in scores.items() if one != name}, scores | {name: float("nan")}):
        with pytest.raises(ValueError, match=f"needs 16 dimensions and lacks {name}; measure them all"):
            totals.compute_totals(broken)


def test_a_substitutes_score_takes_no_place_in_a_total() -> None:
    scores = every_dimension()
    scores["motion_smoothness@mean"] = scores.pop("motion_smoothness")
    with pytest.raises(ValueError, match="lacks motion_smoothness; motion_smoothness@mean are of substitute networks"):
        totals.compute_totals(scores)
    with pytest.raises(ValueError, match="temporal_quality needs 4 dimensions and lacks motion_smoothness"):
        totals.compute_competition(scores, "temporal_quality")


def test_a_value_beyond_its_range_is_not_clipped() -> None:
    assert (
        totals.compute_totals(every_dimension() | {"scene": 1.0}).semantic
        > totals.compute_totals(every_dimension() | {"scene": 0.8222}).semantic
    )
