"""A night compares its clips with the training set, says what moved, and fails for nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.night import clips
from flows.night.inbox import Arrivals
from tests.flows.test_night_ends import at_work, promoting, repo  # noqa: F401  a fixture


def drift_command(answer: dict[str, Any] | None) -> Any:
    """Stand in for `cf drift`: write the numbers that are given, or fail."""

    def run(words: list[str], *, cwd: Path, **_: Any) -> tuple[int, list[str]]:
        assert words[2:4] == ["tasks", "drift"] and (cwd / "work/arrived.txt").read_text() == "é a.mp4\nb.mp4\n"
        if answer is None:
            return 1, ["cf drift: broken"]
        (cwd / "nightly").mkdir(exist_ok=True)
        (cwd / "nightly/drift.json").write_text(json.dumps(answer))
        return 0, []

    return run


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"sentence": "tonight's clips differ", "findings": [{"drifted": False}, {"drifted": True}]}, "better; tonight's clips differ"),
        ({"sentence": "alike", "findings": [{"drifted": False}]}, "better"),
        (None, "better"),
    ],
)
def test_a_night_that_drifts_says_so(repo: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str) -> None:  # noqa: F811
    night = at_work(repo, [])
    night.arrivals = Arrivals(copied=["é a.mp4", "b.mp4"])
    stale = night.plan.root / "nightly/drift.json"
    stale.parent.mkdir(exist_ok=True)
    stale.write_text(json.dumps({"sentence": "of last night", "findings": [{"drifted": True}]}))
    monkeypatch.setattr(clips, "run_logged", drift_command(answer))
    clips.compare_with_training_set(night)
    assert promoting(night, "aa").why == said
