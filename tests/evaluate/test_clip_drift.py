"""Tonight's clips against the training set: what moved is named, and what did not is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cf_model.evaluate.clip_drift import compare_clips, draw_page, mark_drift, say_drift
from tasks.commands import drift
from tasks.params.yaml_file import Refused

BOUNDS = {"frozen": ("motion", ">=", 0.5), "blurred": ("sharpness", ">=", 1.0)}
PROFILE = Path(__file__).parents[2] / "profiles/smoke.yaml"


def rows(prefix: str, count: int, motion: float, *, rejected: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"source": f"{prefix}{i}", "kept": i >= rejected, "reason": "blurred" if i < rejected else None,
         "values": {"frozen": motion + rng.normal(), "blurred": 4 + rng.normal()}}
        for i in range(count)
    ]  # fmt: skip


def find(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return compare_clips([*old, *new], {row["source"] for row in new}, BOUNDS)


def test_values_that_moved_are_named_and_others_are_not() -> None:
    findings = find(rows("a", 200, 5.0), rows("b", 20, 9.0, seed=1))
    assert [one["reason"] for one in findings if one["drifted"]] == ["frozen"]
    assert "differ from the training set: frozen (the median motion is" in say_drift(findings, 20)


def test_a_rule_that_rejects_another_share_is_named() -> None:
    findings = find(rows("a", 200, 5.0, rejected=10), rows("b", 30, 5.0, rejected=15, seed=1))
    [moved] = [one for one in findings if one["drifted"]]
    assert (moved["what"], moved["reason"]) == ("rejections", "blurred") and "50% of tonight's clips" in moved["about"]


def test_nights_of_the_same_clips_seldom_drift() -> None:
    drifted = [
        any(one["drifted"] for one in find(rows("a", 100, 5.0, seed=seed), rows("b", 12, 5.0, seed=900 + seed))) for seed in range(100)
    ]
    assert sum(drifted) <= 3


def test_too_few_clips_are_said_and_names_are_escaped() -> None:
    assert "too few" in say_drift(find(rows("a", 100, 5.0), rows("b", 2, 9.0)), 2)
    findings = find(rows("a", 20, 5.0), rows("b", 20, 9.0, seed=1))
    assert "<script>" not in draw_page(findings, "<script>")


def test_the_command_writes_a_page_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, names, page = tmp_path / "manifest.jsonl", tmp_path / "new.txt", tmp_path / "nightly/drift.html"
    words = ["--new", str(names), "--manifest", str(manifest), "--out", str(page), "--params", str(PROFILE)]
    with pytest.raises(Refused, match=r"new\.txt is not there"):
        drift.main(words)
    new = rows("né w", 20, 9.0, seed=1)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows("a", 100, 5.0), *new]))
    names.write_text("".join(f"{row['source']}\n" for row in new), encoding="utf-8")
    drift.main(words)
    assert json.loads(page.with_suffix(".json").read_text())["sentence"] in capsys.readouterr().out
    assert page.read_text().count("<svg") == 2


def test_all_findings_of_a_night_share_the_chance() -> None:
    """A p of 0.005 names a finding that stands alone, and none among five, whose smallest must be at 0.002."""

    def finding(p: float) -> dict[str, object]:
        return {"reason": "blur", "p": p, "moved": 0.5}

    assert [one["drifted"] for one in mark_drift([finding(0.005)])] == [True]
    assert not any(one["drifted"] for one in mark_drift([finding(0.005), *(finding(0.5) for _ in range(4))]))
