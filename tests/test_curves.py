"""`cf curves`: what a person at a terminal sees of a training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import tasks.__main__ as cf
from cf_model.evaluate import text_curves
from tasks.commands import curves
from tasks.params.yaml_file import Refused


def written(file: Path, rows: list[dict[str, float]], rest: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)


def test_a_letter_stands_for_the_mean_of_its_steps() -> None:
    assert text_curves.average_neighbours([1, 3, 5, 7], 2) == [2, 6] and curves.average_neighbours([1, None, None, None], 2) == [1, None]
    assert text_curves.average_neighbours([4.0], 40) == [4]
    assert text_curves.draw_line([0, 1, None, 0.5, 1], "_-^") == "_^ -^" and curves.draw_line([3, 3], "_-^") == "__"


def test_a_run_that_goes_on_is_shown_before_one_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"neither work/base/\*/metrics.jsonl nor models/base/metrics.jsonl"):
        cf.main(["curves", "base"])
    written(Path("models/base/metrics.jsonl"), [{"step": n, "loss": 10 - n, "gradient": 1} for n in range(1, 9)])
    cf.main(["curves", "base", "loss"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["models/base/metrics.jsonl: steps 1 to 8", "loss █▇▆▅▄▃▂▁ 2 .. 9, last 2"]
    old, new = Path("work/base/aa/metrics.jsonl"), Path("work/base/bb/metrics.jsonl")
    written(old, [{"step": 1, "loss": 5}])
    written(new, [{"step": 1, "loss": 5}, {"step": 2, "loss": 6, "rare": 3}], rest='{"step": 3, "lo')
    os.utime(old, (1, 1))
    cf.main(["curves", "base"])
    assert capsys.readouterr().out.splitlines() == [f"{new}: steps 1 to 2", "loss ▁█ 5 .. 6, last 6", "rare  ▁ 3 .. 3, last 3"]
    with pytest.raises(Refused, match="no value that begins with critic; it has loss, rare"):
        cf.main(["curves", "base", "critic"])


def test_seconds_and_terminals_without_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("runtime/stage2.timing.jsonl"), [{"step": 1, "seconds/rollout": 1.0, "peak_mib": 5}, {"step": 2, "seconds/rollout": 2.0}])
    monkeypatch.setattr(curves, "RAMPS", ("_#", "_#"))
    cf.main(["curves", "stage2", "--seconds"])
    assert capsys.readouterr().out.splitlines()[1:] == ["seconds/rollout _# 1 .. 2, last 2", "peak_mib        _  5 .. 5, last 5"]
