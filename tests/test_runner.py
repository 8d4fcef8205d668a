"""The shell around a stage: nothing half-written, nothing lost by a kill, two never at once."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tasks.__main__ as entry
from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tasks.runner import execute as runner
from tasks.runner import ranks
from tasks.runner import track as tracking

ROOT = Path(__file__).parent.parent
PARAMS = SimpleNamespace(seed=0, threads=1, watch=(), tracking=SimpleNamespace(wandb="off", project="toy"))
STATED = {"seed": 0, "toy": {"steps": 6}, "other": 1}
PIPELINE = "stages:\n  toy:\n    cmd: python -m tasks toy\n    deps: [data.txt, code.py, folder]\n    params: [seed, toy.steps]\n"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(PIPELINE)
    for name in ("data.txt", "code.py"):
        Path(name).write_text(name)
    Path("folder").mkdir()
    Path("folder/inside.txt").write_text("x")
    yield tmp_path


def toy(stated: dict[str, Any] = STATED) -> Project:
    project = Project()
    project.tree, project.params = stated, PARAMS  # type: ignore[assignment]
    return project


def execute(run: Any, out: str = "made/out.txt") -> None:
    runner.execute("toy", run, {"data": Path("data.txt"), "out": Path(out)}, toy(), began=time.time())


def key(stated: dict[str, Any] = STATED, **paths: Path) -> str:
    return runner.compute_key("toy", {"data": Path("data.txt"), "out": Path("out.txt"), **paths}, toy(stated))


def good(params: Any, track: tracking.Track, *, data: Path, out: Path) -> dict[str, Any]:
    track.log(1, loss=0.123456789)
    out.write_text(data.read_text())
    return {"b": 1 / 3, "a": {"n": 2}}


def bad(params: Any, track: tracking.Track, *, data: Path, out: Path) -> dict[str, Any]:
    out.write_text("half")
    raise ValueError("no clip passes the filter")


def test_a_stage_leaves_its_out_its_metrics_and_runtime_facts() -> None:
    execute(good)
    assert Path("made/out.txt").read_text() == "data.txt"
    assert Path("metrics/toy.json").read_text() == '{\n  "a": {\n    "n": 2\n  },\n  "b": 0.333333\n}\n'
    facts = json.loads(Path("runtime/toy.json").read_text())
    assert facts["wall_seconds"] >= 0 and facts["peak_mib"] > 1 and facts["threads"] == 1
    script = Path("runtime/runtime.js").read_text()
    assert json.loads(script.removeprefix("window.CF_RUNTIME = ").rstrip(";\n"))["toy"] == facts
    assert list(Path("work/toy").iterdir()) == []


@pytest.mark.parametrize(("command", "pauses"), [("stage2", True), ("video", False)])
def test_libraries_are_imported_without_collecting_garbage_and_a_stage_works_with_it(
    command: str, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is no stage never gets to the end of the pause, so it has none."""
    collects = list[bool]()

    def run(*given: Any, **paths: Path) -> dict[str, Any]:
        collects.append(gc.isenabled())
        return good(*given, **paths)

    def main(argv: list[str]) -> None:
        collects.append(gc.isenabled())
        execute(run)

    monkeypatch.setattr(entry, "main", main)
    monkeypatch.setattr(entry, "fix_environment", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cf", command])
    try:
        with pytest.raises(SystemExit):
            entry.cli()
        assert collects == [not pauses, True] and (gc.get_freeze_count() > 0) == pauses
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_failure_leaves_what_was_there() -> None:
    execute(good)
    before = {path: path.read_bytes() for path in (Path("made/out.txt"), Path("metrics/toy.json"), Path("runtime/toy.json"))}
    Path("data.txt").write_text("new")
    with pytest.raises(ValueError, match="no clip passes"):
        execute(bad)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in Path("made").iterdir()] == ["out.txt"]


@pytest.mark.parametrize(
    "write",
    [lambda: save_file({"x": torch.zeros(9999)}, "made/weights"), lambda: Path("made/weights").write_text("x" * 9999)],
    ids=["safetensors", "the system"],
)
def test_a_disk_that_is_full_when_a_stage_saves_is_one_sentence(write: Any) -> None:
    """Real errors, of a file that may not grow: those of safetensors have no number of their own."""

    def full(params: Any, track: tracking.Track, *, data: Path, out: Path) -> dict[str, Any]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return {}

    with pytest.raises(ValueError, match=r"no room for what toy makes \(File too large\); its checkpoints in work/toy/\w+ are intact"):
        execute(full)


def test_a_folder_takes_the_place_of_the_old_one() -> None:
    def folder(params: Any, track: tracking.Track, *, data: Path, out: Path) -> dict[str, Any]:
        assert not out.exists() and out.name == "models.partial"
        out.mkdir()
        (out / data.read_text()).write_text("")
        return {}

    execute(folder, "models")
    Path("data.txt").write_text("second")
    Path("models.partial").mkdir()  # as a kill leaves it
    Path("models.partial/rest").write_text("")
    execute(folder, "models")
    assert [path.name for path in Path("models").iterdir()] == ["second"]
    assert not Path("models.partial").exists() and not Path("models.old").exists()


def test_a_metric_that_is_not_finite_is_refused() -> None:
    def nan(params: Any, track: tracking.Track, *, data: Path, out: Path) -> dict[str, Any]:
        out.write_text("")
        return {"system": {"loss": float("nan")}}

    with pytest.raises(ValueError, match=r"toy\.system\.loss is nan"):
        execute(nan)
    assert not Path("made/out.txt").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda: Path("data.txt").write_text("changed"),
        lambda: Path("code.py").write_text("changed"),
        lambda: Path("folder/inside.txt").write_text("changed"),
        lambda: Path("folder/inside.txt").rename("folder/renamed.txt"),
        lambda: Path("folder/inside.txt").unlink(),
        lambda: Path("dvc.yaml").write_text(PIPELINE.replace("toy.steps", "other")),
    ],
)
def test_the_key_changes_with_all_a_stage_depends_on(change: Any) -> None:
    before = key()
    change()
    assert key() != before


def test_the_key_changes_with_parameters_of_the_stage_only() -> None:
    before = key()
    assert key(STATED | {"other": 2}) == before
    assert key(STATED | {"toy": {"steps": 7}}) != before
    assert key(out=Path("elsewhere")) != before
    Path("unlisted.txt").write_text("1")
    assert key() == before
    listed = key(extra=Path("unlisted.txt"))
    Path("unlisted.txt").write_text("2")
    assert key(extra=Path("unlisted.txt")) != listed, "a file given by hand counts too"
    with pytest.raises(Refused, match=r"toy\.steps isn't in params\.yaml"):
        key({"seed": 0, "toy": {}})


def test_the_key_follows_what_params_yaml_fills_in() -> None:
    Path("dvc.yaml").write_text(PIPELINE.replace("data.txt, code.py, folder", '"${start.toy}"'))
    one = key(STATED | {"start": {"toy": "folder"}})
    assert key(STATED | {"start": {"toy": "code.py"}}) != one
    Path("folder/inside.txt").write_text("changed")
    assert key(STATED | {"start": {"toy": "folder"}}) != one
    with pytest.raises(Refused, match=r"start\.toy isn't in params\.yaml"):
        key()


STAGE = f"""
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tasks.runner.execute import execute

def run(params, track, *, data, out):
    saved = track.work / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    if first:
        assert track.resume
        track.resumed(first)
    for step in range(first + 1, 7):
        track.log(step, square=step * step)
        if step % 2 == 0:
            saved.write_text(str(step))
        if step == 5 and os.environ.get("HANG"):
            print("hanging", flush=True)
            time.sleep(60)
    out.mkdir()
    track.save(out)
    return {{}}

project = Project()
project.tree = {STATED!r}
project.params = SimpleNamespace(seed=0, threads=1, watch=(), tracking=SimpleNamespace(wandb="off", project="toy"))
try:
    execute("toy", run, dict(data=Path("data.txt"), out=Path("model")), project, began=time.time())
except Refused as error:
    sys.exit(str(error))
"""


def start(**environment: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", STAGE], env=os.environ | environment, **pipes)


def hanging() -> subprocess.Popen[str]:
    process = start(HANG="1")
    assert process.stdout and process.stdout.readline() == "hanging\n", process.communicate()
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_ends_as_never_killed(end: signal.Signals, project: Path) -> None:
    first = hanging()
    first.send_signal(end)
    first.wait(timeout=120)
    assert first.returncode == (143 if end == signal.SIGTERM else -9)
    (folder,) = Path("work/toy").iterdir()
    assert (folder / "step").read_text() == "4" and not Path("model").exists()
    with (folder / "metrics.jsonl").open("a") as curve:
        curve.write('{"step": 6, "squ')  # a kill in the middle of a row

    assert start().wait(timeout=120) == 0
    rows = Path("model/metrics.jsonl").read_text()
    assert [json.loads(row) for row in rows.splitlines()] == [{"step": n, "square": n * n} for n in range(1, 7)]
    assert Path("model/metrics.csv").read_text() == "step,square\n" + "".join(f"{n},{n * n}\n" for n in range(1, 7))
    assert json.loads(Path("runtime/toy.json").read_text())["resumed_at"] == 4
    assert list(Path("work/toy").iterdir()) == []


STAGES = [stage for stage in Project(ROOT / "params.yaml").stages if stage not in ("validate", "clips")]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_by_hand_without_an_input_refuses_before_its_first_step(stage: str) -> None:
    """A codec that is missing was said at the first sample video, after 19 of 20 steps."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    project = Project()
    words = shlex.split(project.stages[stage]["cmd"])[4:]
    read = [(name, Path(path)) for name, path in zip(words[::2], words[1::2], strict=True) if name != "--out"]
    for _, path in read:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    name, path = read[-1]
    path.unlink()
    with pytest.raises(Refused, match=re.escape(f"{name} is {path}, which is not there; `cf repro {stage}` makes")):
        ranks.run_stage(stage, words, project)
    assert not Path("work").exists()


def test_a_second_process_stops_with_one_sentence() -> None:
    first = hanging()
    try:
        second = start()
        _, said = second.communicate(timeout=120)
        assert second.returncode == 1
        (folder,) = Path("work/toy").iterdir()
        assert said.strip() == f"{folder} is in use by process {first.pid}; wait for it to end, or end it, and start again"
    finally:
        first.kill()
        first.communicate()
