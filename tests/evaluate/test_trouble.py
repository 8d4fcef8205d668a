"""Training curves that leave their bounds: named once, by name and value, while it happens and afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cf_model.evaluate.trouble import CurveRule, find_troubles
from tasks.params import load
from tasks.runner.track import Track

ROOT = Path(__file__).parent.parent.parent
DIVERGES = CurveRule(curve="critic_loss", above=3.0, below=None, steps=3, means="the critic diverges")
SILENT = CurveRule(curve="promotion", above=None, below=0.01, steps=2, means="nothing is promoted")


def rows(**curves: list[float]) -> list[dict[str, float]]:
    count = len(next(iter(curves.values())))
    return [{"step": n + 1} | {name: values[n] for name, values in curves.items()} for n in range(count)]


def test_a_curve_above_its_bound_is_named_with_its_value_and_step():
    """As stage 1 at 50 times its learning rate: 0.44, then 12,700."""
    (said,) = find_troubles(rows(critic_loss=[0.44, 0.5, 0.6, 9.0, 12700.0, 12700.0]), [DIVERGES])
    assert said == "critic_loss is 3.36667 at step 4 (mean of 3), above 3: the critic diverges"


def test_a_mean_is_watched_and_not_a_single_step():
    assert find_troubles(rows(critic_loss=[0.4, 8.0, 0.4, 0.4, 8.0, 0.4]), [DIVERGES]) == []
    assert find_troubles(rows(critic_loss=[9.0, 9.0]), [DIVERGES]) == [], "too few steps to say"


def test_below_and_off():
    nothing = rows(promotion=[0.5, 0.2, 0.0, 0.0, 0.0])
    (said,) = find_troubles(nothing, [SILENT])
    assert said.startswith("promotion is 0 at step 4 (mean of 2), below 0.01")
    assert find_troubles(nothing, [replace(SILENT, below=None)]) == [], "null: no bound"


def test_rows_without_the_curve_do_not_count():
    """The student's values stand in every third row only, and a bad step's value is null."""
    seldom = [{"step": n, "critic_loss": 9.0} if n % 3 == 0 else {"step": n, "critic_loss": None} for n in range(1, 10)]
    assert len(find_troubles(seldom, [DIVERGES])) == 1 and "step 9" in find_troubles(seldom, [DIVERGES])[0]


def test_a_run_says_it_once_and_a_resumed_run_does_not_say_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    track = Track("stage1", tmp_path, rules=[DIVERGES])
    for row in rows(critic_loss=[9.0] * 6):
        track.log(int(row["step"]), critic_loss=row["critic_loss"])
    said = capsys.readouterr().err
    assert said.startswith("stage1: critic_loss is 9 at step 3 (mean of 3), above 3: the critic diverges; docs/training.md, Trouble")
    assert said.count("\n") == 1, "once"
    again = Track("stage1", tmp_path, resume=True, rules=[DIVERGES])
    again.resumed(5)
    again.log(6, critic_loss=9.0)
    assert "critic_loss" not in capsys.readouterr().err
    earlier = Track("stage1", tmp_path, resume=True, rules=[DIVERGES])
    earlier.resumed(2)
    earlier.log(3, critic_loss=9.0)
    assert "critic_loss is 9 at step 3" in capsys.readouterr().err, "it had not happened before that checkpoint"


@pytest.mark.parametrize("profile", ["tiny", "smoke", "wan-1.3b"])
def test_every_profile_watches_the_critic_and_the_memory(profile: str):
    watched = {rule.curve for rule in load.load_params(ROOT / f"profiles/{profile}.yaml").watch}
    assert {"critic_loss", "similarity", "loss"} <= watched
