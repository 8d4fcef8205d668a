"""What a stage tells: rows that a rerun repeats, a bar for a person. The mirror in W&B: tests/test_mirror.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tasks.runner import track as tracking


def test_rows_after_a_step_are_cut(tmp_path: Path) -> None:
    track = tracking.Track("toy", tmp_path)
    for step in (10, 20, 30):
        track.log(step, loss=step / 7)
    track.cut(20)
    again = tracking.Track("toy", tmp_path, resume=True)
    again.log(20, loss=float("inf"))  # started from the beginning without saying so: no row stands twice
    again.log(20, other=1)
    assert [json.loads(row) for row in again.curve.read_text().splitlines()] == [
        {"step": 10, "loss": 1.42857},
        {"step": 20, "loss": None},
        {"step": 20, "other": 1},
    ]


def test_resumed_runs_log_again_what_came_after_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track = tracking.Track("toy", tmp_path)
    for step in (10, 20, 25):
        track.log(step, loss=1)
    again = tracking.Track("toy", tmp_path, resume=True)
    again.resumed(20)
    again.log(30, loss=1)
    assert [json.loads(row)["step"] for row in again.curve.read_text().splitlines()] == [10, 20, 30]
    assert again.facts["resumed_at"] == 20 and capsys.readouterr().err == "toy: continues after step 20\n"


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "PLAIN_SECONDS", 0.02)
    bar = tracking.Track("toy", tmp_path).progress(10, "clip", start=4)
    for _ in range(3):
        time.sleep(0.03)
        bar.update(2, loss=0.5)
    bar.close()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("toy: 6 of 10 clips, ") and first.endswith(" s left, loss 0.5")
    assert last.startswith("toy: 10 of 10 clips, ") and "left" not in last


def test_the_end_of_a_curve(tmp_path: Path) -> None:
    track = tracking.Track("toy", tmp_path)
    for step in range(1, 41):
        track.log(step, loss=step, **({"rare": 7.0} if step == 3 else {}))
    out = tmp_path / "out"
    out.mkdir()
    track.save(out)
    assert [tracking.mean_of_tail(out, name) for name in ("loss", "rare", "none")] == [38.5, 7, None]
    assert (out / "metrics.csv").read_text().splitlines()[:4] == ["step,loss,rare", "1,1,", "2,2,", "3,3,7.0"]
