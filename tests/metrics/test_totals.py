"""Totals and aggregates against the numbers that the papers print, and their refusals."""

from __future__ import annotations

import pytest

from cf_model.evaluate.published import OURS, find_published, list_published
from cf_model.metrics import totals

ROUNDED = 0.0101  # of two decimals in the sum and in what is summed
SECONDS = (50, 75, 100)


@pytest.mark.parametrize("seconds", SECONDS)
def test_table_7_gives_tables_1_and_2(seconds: int) -> None:
    rows = find_published("self-forcing++", "7", seconds)
    main = find_published("self-forcing++", "1" if seconds == 50 else "2", seconds)
    assert len(rows) == 6 and rows.keys() == {system for system in main if "text_alignment" in main[system]}
    for system, printed in rows.items():
        for aggregate in totals.COMPETITION:
            assert totals.compute_competition(printed, aggregate) == pytest.approx(printed[aggregate], abs=ROUNDED), aggregate
            assert printed[aggregate] == main[system][aggregate]


def test_printed_totals_follow_from_their_columns_but_for_four() -> None:
    found = {}
    for paper, table, seconds in (("context-forcing", "2", 5), ("context-forcing", "2", 60), ("context-forcing", "3", 60)):
        for system, row in find_published(paper, table, seconds).items():
            computed = totals.recompute_printed_total(row["quality"], row["semantic"], row["total"])
            if computed is not None:
                found[table, seconds, system] = computed
    assert found == {
        ("2", 60, "LongLive"): 82.62,
        ("2", 60, "Rolling Forcing"): 79.03,
        ("2", 60, "Infinity-RoPE"): 79.51,
        ("2", 60, OURS): 82.06,  # printed: 82.45
        ("3", 60, OURS): 82.06,
    }


def test_every_published_number_is_cited() -> None:
    """Each says its paper and table; scores say what they are of. A number of Table 1, spot-checked by its place."""
    numbers = list_published()
    assert {(one.paper, one.table) for one in numbers} == {
        *(("context-forcing", table) for table in "123"),
        *(("self-forcing++", table) for table in "127"),
    }
    assert all(
        one.citation.startswith(("Context Forcing, arXiv 2602.06028v1, Table", "Self-Forcing++, arXiv 2510.02283, Table"))
        for one in numbers
    )
    assert {one.metric for one in numbers if one.protocol is None} == {"context_length", "parameters_billion", "frames_a_second"}
    assert find_published("context-forcing", "1", 60)["LongLive"]["clip_t_50s"] == 35.92
    assert find_published("context-forcing", "1", 10)["Context Forcing, teacher"]["dinov2_10s"] == 87.61


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
