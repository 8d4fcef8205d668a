"""What a stage tells: rows that a rerun repeats, a bar for a person, a mirror that may break."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tasks import tracking


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


def test_one_name_for_all_stages_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CF_RUN", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    first = tracking.pipeline_run(Path("work"))
    assert tracking.pipeline_run(Path("work")) == first
    monkeypatch.setattr(os, "getpgrp", lambda: -1)
    assert tracking.pipeline_run(Path("work")) != first
    monkeypatch.setenv("CF_RUN", "nightly-7")
    assert tracking.pipeline_run(Path("work")) == "nightly-7"


def test_a_broken_tracker_never_ends_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(self: tracking.Mirror) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking.Mirror, "_started", broken)
    track = tracking.Track("toy", tmp_path, mirror=tracking.Mirror("toy", "online", "toy", {}))
    with pytest.warns(UserWarning, match="W&B stopped working"):
        track.log(1, loss=1.0)
    track.log(2, loss=1.0)
    track.close({"loss": 1.0})
    assert len(track.curve.read_text().splitlines()) == 2


def test_the_end_of_a_curve(tmp_path: Path) -> None:
    track = tracking.Track("toy", tmp_path)
    for step in range(1, 41):
        track.log(step, loss=step, **({"rare": 7.0} if step == 3 else {}))
    out = tmp_path / "out"
    out.mkdir()
    track.save(out)
    assert tracking.tail(out, "loss") == 38.5 and tracking.tail(out, "rare") == 7 and tracking.tail(out, "none") is None
    assert (out / "metrics.csv").read_text().splitlines()[:4] == ["step,loss,rare", "1,1,", "2,2,", "3,3,7.0"]


def test_offline_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Really written by W&B, with the pipeline run as group, and outside everything that DVC hashes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("CF_RUN", "nightly-7")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    mirror = tracking.mirror("toy", cast(Any, SimpleNamespace(wandb="off", project="toy")), {"seed": 41})
    track = tracking.Track("toy", work, mirror=mirror)
    track.log(1, loss=0.123456789)
    track.time(1, {"rollout": 1.5}, peak_mib=99.0)
    track.keep_times(tmp_path / "times")
    track.close({"psnr": 28.25})
    folder = Path(track.facts["wandb"])
    assert folder.parent == Path("runtime/wandb") and track.facts["seconds"] == {"rollout": 1.5}
    (record,) = folder.glob("run-*.wandb")
    for _ in range(100):  # W&B's own process may still be writing when finish() returns
        if len(text := record.read_bytes()) > 7:
            break
        time.sleep(0.1)
    assert all(word in text for word in (b"nightly-7", b"toy nightly-7", b"0.123457", b"seconds/rollout", b"28.25", b"seed"))
    assert re.search(rb"(?<!toy )nightly-7", text), "the group, beside the name"
    assert not Path("wandb").exists() and "rollout" not in track.curve.read_text()


@pytest.mark.parametrize(
    ("stated", "environment", "mode"),
    [("off", "", None), ("offline", "", "offline"), ("offline", "disabled", None), ("off", "online", "online")],
)
def test_the_environment_has_the_last_word(stated: str, environment: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    mirror = tracking.mirror("toy", cast(Any, SimpleNamespace(wandb=stated, project="toy")), {})
    assert (mirror.mode if mirror else None) == mode
