"""A candidate is promoted by numbers that were measured, on the same prompts and seeds, and by nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flows.night import gate
from flows.night.gate import Measured, Rule, Verdict, decide_promotion, find_number
from tasks.params import nightly

SHOWN = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
RULES = [
    Rule(metric="prompts.student.recall", better="higher", margin=0.0, bound=0.5),
    Rule(metric="prompts.student.jitter", better="lower", margin=-0.1, bound=None),
]


def judged(recall: Any = 0.8, jitter: Any = 1.0, shown: list[tuple[str, int]] = SHOWN, version: str | None = None) -> Measured:
    values = {name: value for name, value in (("recall", recall), ("jitter", jitter)) if value is not None}
    return Measured(md5="m.dir", numbers={"prompts": {"student": values}}, videos=shown, version=version)


def verdict(candidate: Measured, promoted: Measured | None = None, rules: list[Rule] = RULES) -> Verdict:
    return decide_promotion(candidate, promoted, rules)


def test_better_is_promoted_and_so_is_no_worse_than_the_margin() -> None:
    assert verdict(judged(0.81, 1.0), judged()).promote
    assert verdict(judged(0.8, 1.0), judged()).promote
    assert verdict(judged(0.8, 1.1 - 1e-9), judged()).promote


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (judged(0.79), "prompts.student.recall is 0.79, and must be no worse than the promoted student's 0.8"),
        (judged(0.9, 1.2), "prompts.student.jitter is 1.2, and must be no more than 0.1 worse than the promoted student's 1"),
        (judged(0.4), "prompts.student.recall is 0.4, below its bound 0.5"),
        (judged(None), "prompts.student.recall was not measured for the candidate"),
        (judged(math.nan), "prompts.student.recall was not measured for the candidate"),
        (judged(math.inf), "prompts.student.recall was not measured for the candidate"),
        (judged("0.9"), "prompts.student.recall was not measured for the candidate"),
        (judged(True), "prompts.student.recall was not measured for the candidate"),
        (judged(0.9, shown=SHOWN[:-1]), "not shown the same prompts and seeds"),
        (judged(0.9, shown=[*SHOWN[:-1], ("b", 2)]), "not shown the same prompts and seeds"),
        (judged(0.9, shown=[]), "the candidate has no videos"),
    ],
)
def test_it_refuses_by_name(candidate: Measured, words: str) -> None:
    found = verdict(candidate, judged())
    assert words in found.why and not found.promote


def test_numbers_that_the_promoted_student_lacks_promote_nothing() -> None:
    found = verdict(judged(0.99), judged(None))
    assert not found.promote and "not measured for the promoted student" in found.why


def test_the_first_student_is_held_to_what_is_absolute() -> None:
    assert verdict(judged(0.6)).promote
    assert not verdict(judged(0.4)).promote
    assert not verdict(judged(None)).promote


def test_improvement_can_be_asked_for() -> None:
    rules = [Rule(metric="prompts.student.recall", better="higher", margin=0.05, bound=None)]
    assert not verdict(judged(0.84), judged(), rules).promote
    assert verdict(judged(0.86), judged(), rules).promote
    assert "must be 0.05 better" in verdict(judged(0.84), judged(), rules).why


def test_no_rule_promotes_nothing() -> None:
    assert not verdict(judged(0.9), judged(), []).promote


def test_the_file_has_every_number(tmp_path: Path) -> None:
    verdict(judged(0.9), judged(version="v0.0.7")).write(tmp_path / "nightly/gate.json")
    said = json.loads((tmp_path / "nightly/gate.json").read_text())
    assert said["numbers"] == {"candidate": judged(0.9).numbers, "promoted": judged().numbers}
    assert [(one["candidate"], one["promoted"], one["margin"]) for one in said["findings"]] == [(0.9, 0.8, 0.0), (1.0, 1.0, -0.1)]
    assert (said["version"], said["prompts"], said["seeds"], said["promote"]) == ("v0.0.7", ["a", "b"], [0, 1], True)


def test_a_finding_has_the_paired_interval_of_the_gain_and_the_means_decide() -> None:
    """Of jitter less is better, so the gain's interval is that of the difference with its ends and signs exchanged."""
    key = {"suite": "prompts", "system": "student"}
    pairs = [
        key | {"metric": "recall", "difference": 0.1, "low": -0.05, "high": 0.25, "prompts": 8},
        key | {"metric": "jitter", "difference": -0.2, "low": -0.3, "high": -0.1, "prompts": 8},
    ]
    found = decide_promotion(judged(0.9, 0.8), judged(), RULES, pairs=pairs)
    assert found.promote and [(one.low, one.high) for one in found.findings] == [(-0.05, 0.25), (0.1, 0.3)]
    assert "(paired over 8 prompts: +0.2, 95 % +0.1 to +0.3)" in found.findings[1].said
    assert not decide_promotion(judged(0.79, 0.8), judged(), RULES, pairs=pairs).promote
    for other in ([], [pairs[1] | {"metric": "recall"}], [pairs[0] | {"low": None, "high": None}]):
        assert decide_promotion(judged(0.9, 0.8), judged(), RULES, pairs=other).findings[1].low is None
    assert all(one.low is None for one in decide_promotion(judged(), None, RULES, pairs=pairs).findings)


def test_paths_find_numbers_and_nothing_else() -> None:
    tree = {"compared": {"map: a to b.c": {"before": 1}}, "a": {"b": 2.5, "c": [1]}}
    assert find_number(tree, "compared.map: a to b.c.before") == 1 and find_number(tree, "a.b") == 2.5
    assert [find_number(tree, path) for path in ("a", "a.c", "a.x", "a.b.c", "", "compared.map")] == [None] * 6


def test_the_rules_are_those_of_params_yaml() -> None:
    assert Rule.model_fields.keys() == nightly.Rule.model_fields.keys()


def test_a_lower_metric_has_a_bound_from_above() -> None:
    rules = [Rule(metric="prompts.student.jitter", better="lower", margin=0.0, bound=0.5)]
    found = verdict(judged(jitter=0.6), judged(jitter=0.7), rules)
    assert not found.promote and "is 0.6, above its bound 0.5" in found.why
    assert verdict(judged(jitter=0.4), judged(jitter=0.7), rules).promote


def test_every_metric_that_refuses_is_named() -> None:
    why = verdict(judged(0.1, 2.0), judged()).why
    assert "prompts.student.recall is 0.1" in why and "prompts.student.jitter is 2" in why


@pytest.mark.parametrize("name", ["margin", "bound"])
def test_a_rule_without_numbers_would_let_everything_pass(name: str) -> None:
    with pytest.raises(ValueError, match="finite number"):
        Rule(**{"metric": "a", "better": "higher", "margin": 0.0, "bound": None, name: math.nan})


def test_what_needs_truth_is_all_that_rendered_clips_are_measured_by() -> None:
    measured = json.loads((Path(__file__).parents[2] / "metrics/evaluate.json").read_text())
    names = {name for suite in ("prompts", "continuations") for system in measured[suite].values() for name in system}
    of_any_video = {"sharpness", "motion", "stutter", "failures", "motion_late", "motion_spike", "seam_ratio", "repeat_distance"}
    of_any_video |= {"luma_drift", "colour_drift", "sharpness_drift"} | {name for name in names if "@" in name}
    assert {name for name in names if not name.endswith("videos")} == of_any_video | set(gate.NEED_TRUTH)


def test_a_night_whose_training_left_its_bounds_is_not_promoted() -> None:
    """Also the first night, and however good the videos are."""
    good = Measured(md5="a", numbers={"a": 1.0}, videos=[("p", 0)])
    rule = Rule(metric="a", better="higher", margin=0.0, bound=None)
    assert decide_promotion(good, None, [rule]).promote
    verdict = decide_promotion(good, None, [rule], troubles=2)
    assert not verdict.promote and verdict.why.startswith("2 training curves left the bounds of params.yaml's section watch")
