"""docs/evidence.md: tests and verdicts on made-up cells, and a page that says nothing that no cell says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cf_model.evaluate import statistics
from study import inference, page
from study.cells import read_cells
from study.inference import Evidence, Finding, gather_evidence, judge_contrasts
from study.plan import Plan, read_plan
from tests.study_cells import write_made_up

ROOT = Path(__file__).parent.parent
ARMS = {"teacher", "stage1", "cdmd", "memoryless", "memoryless_base", "stage1_longer", "memoryless_short", "slow_0", "slow_3", "slow_6"}
SEEDS = set(range(1, 9))
GAPS = {"cdmd": 30.0, "slow_6": 33.0, "slow_3": 40.0, "slow_0": 50.0}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan().model_copy(update={"resamples": 400})


def differ(arm: str, seed: int) -> float:
    """A clear win of cdmd; seeds differ by more than arms do from seed to seed."""
    return GAPS.get(arm, 50.0) + 4 * seed + (seed % 3) * 0.5 * (arm == "cdmd")


def judge(plan: Plan, folder: Path) -> dict[str, Finding]:
    return {found.contrast.name: found for found in judge_contrasts(gather_evidence(plan, read_cells(folder / "tiny")))}


def test_without_cells_nothing_is_informative(plan: Plan, tmp_path: Path) -> None:
    found = judge(plan, tmp_path)
    assert len(found) == len(plan.contrasts)
    assert {(one.verdict, one.why, one.effect, one.p) for one in found.values()} == {("not informative", "n = 0", None, None)}


def test_a_clear_difference_holds_after_the_familys_correction(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms=ARMS, seeds=SEEDS)
    found = judge(plan, tmp_path)
    one = found["teacher_sees_the_past"]
    assert one.verdict == "holds" and len(one.seeds) == 8 and one.p == pytest.approx(2**-8)
    assert one.p_family == pytest.approx(4 * 2**-8), "four claims in the family"
    assert (
        one.effect == pytest.approx(-19.5, abs=0.5) and one.low is not None and one.high is not None and one.low < one.effect < one.high < 0
    )
    assert found["longer_context"].verdict == "holds" and len(found["longer_context"].seeds) == 5
    assert found["erft"].verdict == "not informative" and found["erft"].why == "n = 0"


def test_a_family_counts_also_the_claims_without_cells(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms={"teacher", "cdmd", "memoryless"}, seeds=SEEDS)
    assert judge(plan, tmp_path)["teacher_sees_the_past"].p_family == pytest.approx(4 * 2**-8)


def test_no_difference_is_a_line_that_does_not_hold(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, lambda arm, seed: 50.0 + seed + (0.1 if (seed % 2) == (arm == "cdmd") else 0.0), arms=ARMS, seeds=SEEDS)
    one = judge(plan, tmp_path)["teacher_sees_the_past"]
    assert one.verdict == "does not hold" and "a gain of 5 is excluded" in one.why


def test_a_difference_the_wrong_way_does_not_hold(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, lambda arm, seed: 100 - differ(arm, seed), arms=ARMS, seeds=SEEDS)
    one = judge(plan, tmp_path)["teacher_sees_the_past"]
    assert one.verdict == "does not hold" and one.p is not None and one.p > 0.99


def test_too_wide_an_interval_says_nothing(plan: Plan, tmp_path: Path) -> None:
    write_made_up(
        plan, tmp_path, lambda arm, seed: 50.0 + (40 if arm == "cdmd" and seed % 2 else 0) - 20 * (arm == "cdmd"), arms=ARMS, seeds=SEEDS
    )
    one = judge(plan, tmp_path)["teacher_sees_the_past"]
    assert one.verdict == "not informative" and "both no gain and one that matters" in one.why


def test_few_seeds_cannot_hold(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms=ARMS, seeds={1, 2, 3})
    one = judge(plan, tmp_path)["teacher_sees_the_past"]
    assert one.verdict == "not informative" and one.why == "n = 3, whose smallest p is 0.12"


def test_a_gate_that_is_not_met_makes_every_claim_uninformative(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms=ARMS, seeds=SEEDS)
    files = list(tmp_path.glob("tiny/*-teacher.jsonl"))
    for file in files:
        text = re.sub(r'("system": "teacher", "metric": "map_error_absent", "mean": )[\d.]+', r"\g<1>60.0", file.read_text())
        file.write_text(text)
    one = judge(plan, tmp_path)["teacher_sees_the_past"]
    assert one.verdict == "not informative" and "the context teacher solves the memory task, 0.75 of chance" in one.why
    for file in files:
        file.unlink()
    assert "not measured" in judge(plan, tmp_path)["teacher_sees_the_past"].why


def test_a_claim_of_two_metrics_needs_both(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms=ARMS, seeds=SEEDS)
    assert judge(plan, tmp_path)["neither_forgets_nor_drifts"].verdict == "holds"
    write_made_up(plan, tmp_path, differ, arms={"cdmd"}, seeds=SEEDS, drift=9.0)
    one = judge(plan, tmp_path)["neither_forgets_nor_drifts"]
    assert one.verdict != "holds" and one.p == 1.0


def test_an_excluded_cell_takes_its_seed_with_it(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms=ARMS, seeds=SEEDS)
    write_made_up(plan, tmp_path, differ, arms={"memoryless"}, seeds={5}, coherence=0.2)
    evidence = gather_evidence(plan, read_cells(tmp_path / "tiny"))
    assert [*evidence.excluded] == [("orbit", "memoryless", 5)] and "coherence 0.2, below 0.5" in evidence.excluded[
        "orbit", "memoryless", 5
    ]
    one = {found.contrast.name: found for found in judge_contrasts(evidence)}["teacher_sees_the_past"]
    assert 5 not in one.seeds and len(one.seeds) == 7 and one.excluded == 1


def test_cells_of_other_parameters_are_left_out_and_counted(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms={"cdmd", "memoryless"}, seeds={1, 2})
    other = plan.model_copy(update={"shared": {"base": {"steps": 7}}})
    evidence = gather_evidence(other, read_cells(tmp_path / "tiny"))
    assert evidence.foreign == 4 and not evidence.cells


# ------------------------------------------------------------------------------------------------------- statistics


def test_signs_are_flipped_exactly() -> None:
    gains = np.array([1.0, 2.0, 0.5, 3.0])
    assert inference.compare_signs(gains) == pytest.approx(1 / 16) and inference.compare_signs(-gains) == 1.0
    assert inference.compare_signs(np.array([1.0, 2.0, -0.5, 3.0])) == pytest.approx(2 / 16)


def test_holm_steps_down() -> None:
    assert statistics.correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.correct_by_holm([0.9, 0.5]) == [1.0, 1.0] and statistics.correct_by_holm([]) == []


def test_the_interval_is_over_seeds_and_clips() -> None:
    draw = np.random.default_rng(1)
    by_seed, by_clip = draw.normal(0, 3, (8, 1)), draw.normal(0, 3, (1, 64))

    def width(table: np.ndarray) -> float:
        low, high = statistics.bootstrap_crossed(table, 2000)
        return high - low

    assert width(np.zeros((8, 64)) + 5) == 0
    assert width(by_seed + np.zeros((1, 64))) == pytest.approx(2 * 1.96 * by_seed.std() / 8**0.5, rel=0.15)
    assert width(by_clip + np.zeros((8, 1))) == pytest.approx(2 * 1.96 * by_clip.std() / 8, rel=0.15)
    assert width(by_seed + by_clip) > max(width(by_seed + 0 * by_clip), width(0 * by_seed + by_clip))
    holes = by_seed + by_clip
    holes[draw.random(holes.shape) < 0.3] = np.nan
    low, high = statistics.bootstrap_crossed(holes, 500)
    assert low < np.nanmean(holes, axis=1).mean() < high


# ------------------------------------------------------------------------------------------------------------- page


def table_of_claims(text: str) -> list[str]:
    return [line for line in text.split("## The claims")[1].split("## The gate")[0].splitlines() if line.startswith("| ")][1:]


def test_a_page_without_cells_invents_nothing(plan: Plan, tmp_path: Path) -> None:
    text = page.write_page(plan, tmp_path / "evidence.md", tmp_path / "evidence", tmp_path / "cells").read_text()
    rows = table_of_claims(text)
    assert len(rows) == len(plan.contrasts) and all(row.endswith("| – | 0 | – | not informative (n = 0) |") for row in rows)
    assert all(page.SCALE in line for line in text.splitlines() if line.startswith("#"))
    assert "No counted cell is there yet" in text and "](evidence/" not in text and not (tmp_path / "evidence").exists()
    assert text.count("No cell yet") >= 6 and "not measured" in text


def test_the_page_shows_what_the_cells_say(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path / "cells", differ, arms=ARMS, seeds=SEEDS)
    paths = tmp_path / "evidence.md", tmp_path / "evidence", tmp_path / "cells"
    text = page.write_page(plan, *paths).read_text()
    assert all(page.SCALE in line for line in text.splitlines() if line.startswith("#"))
    (first,) = [row for row in table_of_claims(text) if "cdmd − memoryless, map error, orbit" in row]
    assert re.search(r"\| primary \| .* \| −19\.\d \[.*, .*\] \| 8 \| 0\.016 \| holds \|$", first)
    assert len([row for row in table_of_claims(text) if row.endswith("not informative (n = 0) |")]) > 8, "what has no cell stays a line"
    links = re.findall(r"\]\((evidence/[^)]+)\)", text)
    assert {"evidence/plane.png", "evidence/curve-1.png", "evidence/drift.png"} <= set(links)
    assert all((tmp_path / link).read_bytes().startswith(b"\x89PNG") for link in links)
    pictures = {link: (tmp_path / link).read_bytes() for link in links}
    assert page.write_page(plan, *paths).read_text() == text and all((tmp_path / link).read_bytes() == pictures[link] for link in links)


def test_another_profile_has_a_table_of_its_own(plan: Plan, tmp_path: Path) -> None:
    small = plan.model_copy(update={"profile": "small"})
    write_made_up(small, tmp_path / "cells", differ, arms={"teacher", "cdmd", "memoryless"}, seeds={1, 2, 3, 4, 5})
    text = page.write_page(plan, tmp_path / "evidence.md", tmp_path / "evidence", tmp_path / "cells").read_text()
    assert all(row.endswith("not informative (n = 0) |") for row in table_of_claims(text)), "tiny has no cells"
    own = text.split(f"## The claims at the profile small, {page.SCALE}")[1].split("## ")[0]
    assert "made up, 2 cores" in own and "| 5 |" in own and own.count("\n| ") == 1 + 3, "the claims that have cells"


def test_the_committed_page_is_that_of_the_committed_cells(tmp_path: Path) -> None:
    made = page.write_page(read_plan(), tmp_path / "evidence.md", tmp_path / "evidence")
    assert made.read_text() == (ROOT / "docs/evidence.md").read_text(), "run `make evidence`"


def test_evidence_needs_common_clips(plan: Plan, tmp_path: Path) -> None:
    write_made_up(plan, tmp_path, differ, arms={"cdmd", "memoryless"}, seeds={1})
    file = tmp_path / "tiny/orbit-1-cdmd.jsonl"
    file.write_text(file.read_text().replace("clip-", "other-"))
    evidence: Evidence = gather_evidence(plan, read_cells(tmp_path / "tiny"))
    with pytest.raises(KeyError, match="no clip in common"):
        inference.tabulate_differences(evidence, "orbit", "cdmd", "memoryless", plan.metrics["map_error"], [1])
