"""What is judged is what was made, each student with its own codec, and W&B hears nothing of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.night import judge, state, steps, warm_start
from flows.night.gate import Measured, Rule
from flows.project import registry
from flows.project.dvc_graph import Stage
from flows.run import stage_task
from tasks.files.hashes import compute_dvc_md5
from tests.flows import project

ROOT = Path(__file__).parents[2]
DVC = """stages:
  stage2:
    cmd: "true"
    deps: [raw.txt]
    outs: [models/stage2, models/codec]
"""
LOCK = """schema: '2.0'
stages:
  stage2:
    cmd: "true"
    outs:
      - {{path: models/stage2, md5: {}.dir}}
      - {{path: models/codec, md5: {}.dir}}
"""


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A night whose candidate was made: both outs are what dvc.lock says."""
    root = project.make(tmp_path / "project")
    (root / "dvc.yaml").write_text(DVC)
    for name in ("stage2", "codec"):
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "weights").write_text(name)
    hashes = [compute_dvc_md5(root / "models" / name).removesuffix(".dir") for name in ("stage2", "codec")]
    (root / "dvc.lock").write_text(LOCK.format(*hashes))
    monkeypatch.setattr(steps, "repro_stages", lambda *_, **__: {})
    for module in (steps, judge):
        monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(steps, "show_table", lambda *_: None)
    settings: Any = SimpleNamespace(rules=[], prompts_file=None, prompts=1)
    given: dict[str, Any] = {"past": [], "promoted": None, "date": "2026-01-07", "clips_folder": None, "log": print, "full": True}
    return state.NightState(state.NightPlan(repo=root, root=root, run="r", base="main", settings=settings, from_folder=False, **given))


@pytest.mark.parametrize("name", ["stage2", "codec"])
def test_what_is_not_what_dvc_says_is_not_judged(one: state.NightState, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "judge_candidate", lambda *_: pytest.fail("it was judged"))
    (one.plan.root / "models" / name / "weights").write_text("x" * len(name))
    with pytest.raises(RuntimeError, match=f"not judged: stage2: {name} has the md5"):
        steps.train_candidate(one)


def test_each_has_its_own_codec(one: state.NightState, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def measure(plan: state.NightPlan, name: str, stages: Any, **given: Any) -> Measured:
        asked[name] = given
        return Measured(md5=name, numbers={}, videos=[("p", 0)])

    monkeypatch.setattr(steps, "measure_student", SimpleNamespace(with_options=lambda **_: measure))
    monkeypatch.setattr(steps, "compare_students", lambda plan: [])
    one.plan = dataclasses.replace(one.plan, promoted=registry.Version("v0.0.1", "main", 0, {"md5": "aa"}))
    steps.judge_candidate(one, [])
    root = one.plan.root
    paths = {name: (given["student"], given["codec"]) for name, given in asked.items()}
    assert paths == {
        "candidate": (root / registry.WEIGHTS, root / warm_start.CODEC),
        "promoted": (root / warm_start.STUDENT, root / warm_start.ITS_CODEC),
    }
    assert len({path for pair in paths.values() for path in pair}) == 4


def test_candidate_and_promoted_are_compared_by_their_cells(one: state.NightState, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `cf compare` itself: what the gate says of a difference is what its page says of the same cells."""
    judged = one.plan.root / "work/judged"
    for name, step in (("promoted", 0.0), ("candidate", 0.25)):
        (judged / name / "results").mkdir(parents=True)
        (judged / name / "params.yaml").write_text("seed: 0\nevaluate: {resamples: 50}\n")
        about = {"suite": "prompts", "system": "student", "clip": None, "file": None, "protocol": "p", "metric": "recall"}
        cells = [about | {"prompt": f"{k}", "seed": s, "file": f"{k}-{s}", "value": k / 10 + step} for k in range(8) for s in (0, 1)]
        (judged / name / "results/cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    monkeypatch.setattr(judge, "stage_environment", lambda *_: {**os.environ})
    monkeypatch.setattr(judge, "run_logged", lambda words, log, cwd, env: (subprocess.run(words, cwd=ROOT, check=True).returncode, []))
    (row,) = judge.compare_students(one.plan)
    assert (row["suite"], row["system"], row["metric"], row["prompts"], row["pairs"]) == ("prompts", "student", "recall", 8, 16)
    assert all(row[name] == pytest.approx(0.25) for name in ("difference", "low", "high")) and row["a"] == pytest.approx(0.35)
    monkeypatch.setattr(judge, "run_logged", lambda *_, **__: (1, ["no"]))
    assert judge.compare_students(one.plan) == []


@pytest.mark.parametrize(("full", "refused"), [(True, True), (False, False)])
def test_a_night_is_refused_for_trouble_in_the_stages_that_it_trained(
    one: state.NightState, full: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm night keeps the other stages as they were for the promoted student, with whatever trouble they had."""
    measured = Measured(md5="m", numbers={"a": 1.0}, videos=[("p", 0)])
    monkeypatch.setattr(steps, "measure_student", SimpleNamespace(with_options=lambda **_: lambda *_, **__: measured))
    (one.plan.root / "metrics").mkdir(exist_ok=True)
    (one.plan.root / "metrics/report.json").write_text('{"troubles": {"base": 1}, "videos": 3}')
    settings: Any = SimpleNamespace(rules=[Rule(metric="a", better="higher", margin=0.0, bound=None)], keep=["base"], prompts_file=None)
    one.plan = dataclasses.replace(one.plan, full=full, settings=settings)
    verdict = steps.judge_candidate(one, [])
    assert verdict.promote is not refused and ("1 training curve left the bounds" in verdict.why) is refused


def test_judging_is_no_run_of_wandb_and_runs_this_nights_code(one: state.NightState, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(stage_task.command, "run", lambda words, **given: seen.update(given) or 1)
    with pytest.raises(RuntimeError, match="stage2 of judged failed"):
        judge._run_stage(one.plan, one.plan.root / "judged", Stage("stage2", command="python -m tasks stage2 --out models/stage2"), {})
    assert seen["env"]["WANDB_MODE"] == "disabled" and seen["env"]["PYTHONPATH"] == str(one.plan.root)
