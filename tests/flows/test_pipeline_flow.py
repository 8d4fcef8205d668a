"""The flow on the project of four stages, with one Prefect server for all tests of this file: what its API says afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows import worktree
from flows.pipeline import pipeline
from flows.run_config import RunConfig
from tests.flows import project

pytestmark = pytest.mark.slow
ALL = dict.fromkeys(project.STAGES, "Completed")


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def root(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project.make(tmp_path / "project", seconds=0.5)
    monkeypatch.chdir(folder)
    for key in [key for key in os.environ if key.startswith(("CF_", "CUDA_"))]:
        monkeypatch.delenv(key)
    return folder


def go(**asked: Any) -> Any:
    """The flow run's final state; `.state_details.flow_run_id` names the run."""
    return pipeline(RunConfig(**asked), return_state=True)


class Seen:
    """What the server knows of a run."""

    def __init__(self, run: Any) -> None:
        with get_client(sync_client=True) as client:
            one = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
            until = time.monotonic() + 20
            while True:  # states of tasks travel as events, and arrive when they arrive
                self.tasks = {task.name: task for task in client.read_task_runs(flow_run_filter=one) if "check parameters" not in task.name}
                if all(task.state and task.state.is_final() for task in self.tasks.values()) or time.monotonic() > until:
                    break
                time.sleep(0.2)
            time.sleep(2)  # logs are sent every two seconds
            self.logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
            only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            self.artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=only)}

    def states(self) -> dict[str, tuple[str, str]]:
        return {name: (str(task.state.type.value), task.state.name) for name, task in self.tasks.items()}

    def lines(self, stage: str) -> list[str]:
        return [log.message for log in self.logs if log.task_run_id == self.tasks[stage].id]


def seen(state: Any) -> Seen:
    return Seen(state.state_details.flow_run_id)


def change(root: Path, before: str, after: str, file: str = "params.yaml") -> None:
    text = (root / file).read_text()
    assert before in text
    (root / file).write_text(text.replace(before, after))


def test_a_run_is_what_dvc_repro_makes_and_what_it_was_is_seen(root: Path, tmp_path: Path) -> None:
    other = project.make(tmp_path / "other", seconds=0.5)
    project.dvc(other, "repro")
    change(root, "seconds: 0.5", "seconds: 3")
    change(other, "seconds: 0.5", "seconds: 3")
    project.dvc(other, "repro")
    state = go()
    assert state.result() == ALL
    assert (root / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()
    run = seen(state)
    assert run.states() == dict.fromkeys(project.STAGES, ("COMPLETED", "Completed"))

    ran = {name: (task.start_time, task.end_time) for name, task in run.tasks.items()}
    assert ran["slow"][0] < ran["stubborn"][1] and ran["stubborn"][0] < ran["slow"][1], "neither needs the other: at the same time"
    assert ran["prepare"][1] <= min(ran["slow"][0], ran["stubborn"][0]) and max(ran["slow"][1], ran["stubborn"][1]) <= ran["last"][1]
    edges = {name: {str(one.id) for one in task.task_inputs["wait_for"]} for name, task in run.tasks.items() if task.task_inputs}
    assert edges["last"] == {str(run.tasks["slow"].id), str(run.tasks["stubborn"].id)}

    lines = run.lines("slow")
    assert [line for line in lines if line.startswith("slow: ")] == [f"slow: {n} of 30 steps, loss {1 / n:.3f}" for n in range(1, 31)]
    chatter = [line for task in project.STAGES for line in run.lines(task) if re.search("git add|dvc push|autostage|lock file|^$", line)]
    assert chatter == []
    times = [log.timestamp for log in run.logs if log.message.startswith("slow: ")]
    assert (times[-1] - times[0]).total_seconds() > 1, "as they come, not at the end"

    assert run.artifacts["progress-slow"].data == 100 and "30 of 30" in run.artifacts["progress-slow"].description
    rows = {(row["stage"], row["metric"]): row["value"] for row in Table(run.artifacts["metrics"]).rows}
    assert rows == {("slow", "loss"): 0.5, ("slow", "of.a"): 1, ("slow", "of.b"): 2.25, ("last", "score"): 1}
    assert (root / "reports/report.html").as_uri() in run.artifacts["report"].data
    assert "| slow | Completed | `runtime/wandb/offline-run-1` |" in run.artifacts["run"].data


class Table:
    def __init__(self, artifact: Any) -> None:
        import json

        self.rows = json.loads(artifact.data) if isinstance(artifact.data, str) else artifact.data


def test_cached_restored_and_ran(root: Path) -> None:
    assert go().result() == ALL
    began = {stage: len(project.pids(root, stage)) for stage in project.STAGES}
    state = go()
    assert state.result() == dict.fromkeys(project.STAGES, "Cached")
    run = seen(state)
    assert run.states() == dict.fromkeys(project.STAGES, ("COMPLETED", "Cached"))
    assert run.lines("last")[:1] == ["last is as it was, by `dvc status`"], "without a process for each"

    change(root, "rate: 2.0e-6", "rate: 3.0e-6")
    assert go().result() == {"prepare": "Cached", "slow": "Completed", "stubborn": "Cached", "last": "Cached"}, "the same bytes again"
    change(root, "rate: 3.0e-6", "rate: 2.0e-6")
    state = go()
    assert state.result() == {"prepare": "Cached", "slow": "Restored", "stubborn": "Cached", "last": "Cached"}
    assert seen(state).states()["slow"] == ("COMPLETED", "Restored")
    assert {stage: len(project.pids(root, stage)) - began[stage] for stage in project.STAGES} == {
        "prepare": 0,
        "slow": 1,
        "stubborn": 0,
        "last": 0,
    }


def test_what_status_calls_unchanged_runs_when_something_before_it_ran_otherwise(root: Path) -> None:
    assert go().result() == ALL
    (root / "raw.txt").write_text("another row\n")
    # by `dvc status` only prepare has changed
    assert go().result() == ALL


def test_a_failure_carries_its_last_lines_and_what_follows_is_skipped(root: Path) -> None:
    """A stage that fails, one that takes too long, one that is tried again."""
    change(root, "timeout: 600", "timeout: 2", "dvc.yaml")
    change(root, "slow: {seconds: 0.5", "slow: {seconds: 60")
    change(root, "stubborn:\n  seconds: 0.5", "stubborn:\n  seconds: much")
    state = go()
    assert (
        state.is_failed()
        and state.message.startswith("slow, stubborn failed: slow took longer than its 2 s")
        and "skipped: last" in state.message
    )
    run = seen(state)
    assert run.states() == {
        "prepare": ("COMPLETED", "Completed"),
        "slow": ("FAILED", "Failed"),
        "stubborn": ("FAILED", "Failed"),
        "last": ("CANCELLED", "Skipped"),
    }
    assert run.tasks["last"].state.message == "slow, stubborn did not complete"
    assert "meta.cf.timeout" in run.tasks["slow"].state.message
    said = run.tasks["stubborn"].state.message
    assert "ValueError: could not convert string to float: 'much'" in said and "exited with 1" in said
    assert len(project.pids(root, "stubborn")) == 2 and len(project.pids(root, "slow")) == 1, "retries: 1 and retries: 0"
    assert not any(psutil.pid_exists(pid) for pid in project.pids(root, "slow"))
    failed = run.tasks["slow"].state.message.splitlines()
    steps = [line for line in failed if line.startswith("slow: ")]
    assert 15 <= len(steps) <= 20 and len(failed) <= 22, "twenty lines, the last ones"


def test_a_stage_that_refuses_is_not_tried_again(root: Path) -> None:
    change(root, 'sys.exit("last: it was told to fail")', "sys.exit(2)", "work.py")
    change(root, "    outs: [reports/report.html]\n", "    outs: [reports/report.html]\n    meta: {cf: {retries: 3}}\n", "dvc.yaml")
    change(root, "fail: false", "fail: true")
    assert go().is_failed()
    assert len(project.pids(root, "last")) == 1


def test_parameters_are_checked_first(root: Path) -> None:
    change(root, "seed: 1", "seed: -1")
    state = go()
    assert state.is_failed() and state.message == "params.yaml: seed is -1; it must be 0 or more"
    assert seen(state).tasks == {} and not (root / "trace").exists()


def test_a_part_of_the_stages_and_only_saying_so(root: Path) -> None:
    assert go(dry_run=True).result() == dict.fromkeys(project.STAGES, "Would run")
    assert not (root / "trace").exists() and not (root / "dvc.lock").exists()
    assert go(to_stage="slow").result() == {"prepare": "Completed", "slow": "Completed"}
    assert go(from_stage="stubborn", at_once=1).result() == {"stubborn": "Completed", "last": "Completed"}
    change(root, "rate: 2.0e-6", "rate: 3.0e-6")
    state = go(dry_run=True)
    assert state.result() == {"prepare": "Cached", "slow": "Would run", "stubborn": "Cached", "last": "Would run"}
    rows = {row["stage"]: row["why"] for row in Table(seen(state).artifacts["dry-run"]).rows}
    assert rows == {"prepare": "nothing changed", "slow": "it changed", "stubborn": "nothing changed", "last": "after slow"}
    assert go(stages=["last", "prepare"]).result() == {"prepare": "Cached", "last": "Cached"}, "slow was not asked for"
    state = go(stages=["slwo"])
    assert state.is_failed() and state.message == "slwo is no stage; did you mean slow? Known are prepare, slow, stubborn, last"


def test_another_profile_runs_elsewhere_and_can_be_repeated_from_its_branch(root: Path, tmp_path: Path) -> None:
    project.dvc(root, "repro", "-q")
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "made")
    state = go(profile="smoke", overrides=["last.times=4", "slow.rate=3e-6"])
    assert state.result() == {"prepare": "Restored", "slow": "Completed", "stubborn": "Completed", "last": "Completed"}
    assert project.git(root, "status", "--porcelain") == "", "the checkout is nobody's workplace"
    (folder,) = worktree.found(root)
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{8}", folder.name) and 'score": 4' in (folder / "metrics/last.json").read_text()
    branch = f"run/{folder.name}"
    assert project.git(root, "diff", "--name-only", "main", branch).split() == ["dvc.lock", "metrics/last.json", "params.yaml"]
    said = project.dvc(folder, "repro")
    assert "Running stage" not in said and said.count("didn't change, skipping") == 4
    # and from the branch alone, anywhere
    clone = tmp_path / "clone"
    project.git(root, "worktree", "add", "-q", "--detach", str(clone), branch)
    worktree.share_cache(root, clone)
    assert "Running stage" not in project.dvc(clone, "repro")
    assert project.git(clone, "status", "--porcelain") == ""
    runtime = [log.message for log in seen(state).logs if branch in log.message]
    assert len(runtime) == 1 and "repeats it" in runtime[0]


def test_a_value_that_is_no_parameter_fails_before_anything_runs(root: Path) -> None:
    state = go(overrides=["slow.rat=1"])
    assert state.is_failed() and state.message == "slow.rat is not a parameter of params.yaml; did you mean slow.rate?"
    assert seen(state).tasks == {}


def started(root: Path, *words: str) -> subprocess.Popen[bytes]:
    """The flow in a process of its own, with a stage at work that ignores SIGTERM and has a child that does."""
    change(root, "seconds: 0.5", "seconds: 300")
    environment = project.environment(PREFECT_API_URL=str(PREFECT_API_URL.value()), PREFECT_HOME=str(root.parent / "prefect"))
    with (root.parent / "said").open("w") as said:
        words = (sys.executable, "-m", "flows.pipeline", *words)
        process = subprocess.Popen(words, cwd=root, env=environment, stdout=said, stderr=said, start_new_session=True)
    until = time.monotonic() + 120
    while not (project.pids(root, "child") and project.pids(root, "slow")):
        assert process.poll() is None and time.monotonic() < until, (root.parent / "said").read_text()
        time.sleep(0.1)
    return process


def at_work(root: Path) -> list[int]:
    return [pid for stage in ("slow", "stubborn", "child") for pid in project.pids(root, stage) if psutil.pid_exists(pid)]


@pytest.mark.parametrize("how", ["cancel", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_leaves_no_process_and_no_open_task(root: Path, how: str) -> None:
    process = started(root)
    assert len(at_work(root)) == 3
    ended = time.monotonic()
    if how == "cancel":
        os.killpg(process.pid, signal.SIGTERM)  # as Prefect's worker does
    else:
        process.send_signal(signal.Signals[how])
    while at_work(root) and time.monotonic() - ended < 20:
        time.sleep(0.05)
    took = time.monotonic() - ended
    assert took < 10, f"{at_work(root)} lived for {took:.1f} s"
    process.wait(30)
    # the next run in this checkout begins, and closes what the dead one left
    before = re.findall(r"Beginning flow run '([\w-]+)'", (root.parent / "said").read_text())
    change(root, "seconds: 300", "seconds: 0.1")
    assert go().result() == ALL | {"prepare": "Cached"}
    with get_client(sync_client=True) as client:
        (dead,) = [run for run in client.read_flow_runs(limit=50) if run.name in before]
        assert dead.state is not None and dead.state.is_final(), dead.state
        states = Seen(dead.id).states()
    assert how != "SIGKILL" or dead.state.type.value == "CRASHED"
    assert {kind for kind, _ in states.values()} <= {"COMPLETED", "CRASHED", "CANCELLED", "FAILED"}, states


def test_one_run_a_checkout(root: Path) -> None:
    with worktree.alone(root):
        state = go()
    assert state.is_failed() and "is in use by another run" in state.message


def test_gpus_are_locked_where_there_are_any(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_GPUS", "2")
    monkeypatch.setenv("CF_GPU_LOCKS", str(tmp_path / "locks"))
    change(root, "meta: {cf: {retries: 1}}", "meta: {cf: {gpus: all}}", "dvc.yaml")
    state = go()
    assert state.result() == ALL
    shown = {file.name.rpartition("-")[0]: file.read_text() for file in (root / "trace").iterdir()}
    assert shown == {"prepare": "", "slow": "0", "stubborn": "0,1", "child": "", "last": ""}
    ran = {name: (task.start_time, task.end_time) for name, task in seen(state).tasks.items()}
    assert ran, "and the two that both want GPU 0 were not at work at the same time:"
    times = {stage: next((root / "trace").glob(f"{stage}-*")).stat().st_mtime for stage in ("slow", "stubborn")}
    assert abs(times["slow"] - times["stubborn"]) >= 0.5
