"""The flow on the project of four stages: what it makes, and what Prefect shows of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil
import pytest
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Failed

from flows.project import dvc_config, dvc_remote, run_lock, worktree
from flows.supervise.environment import stage_environment
from tests.flows import project
from tests.flows.s3 import wait
from tests.flows.served import ALL, change, done_root, go, root, seen
from tests.flows.served import rows as shown_rows
from tests.preloaded import FLOW, python_folder

pytestmark = pytest.mark.slow
__all__ = ["done_root", "root"]  # fixtures


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
    edges = {name: {one.id for one in task.task_inputs.get("wait_for", [])} for name, task in run.tasks.items()}
    ids = {name: task.id for name, task in run.tasks.items()}
    first = {ids["prepare"]}
    assert edges == {"prepare": set(), "slow": first, "stubborn": first, "last": {ids["slow"], ids["stubborn"]}}

    lines = run.lines("slow")
    assert [line for line in lines if line.startswith("slow: ")] == [f"slow: {n} of 30 steps, loss {1 / n:.3f}" for n in range(1, 31)]
    chatter = [line for task in project.STAGES for line in run.lines(task) if re.search("git add|dvc push|autostage|lock file|^$", line)]
    assert chatter == []
    times = [log.timestamp for log in run.logs if log.message.startswith("slow: ")]
    assert (times[-1] - times[0]).total_seconds() > 1, "as they come, not at the end"

    assert run.artifacts["progress-slow"].data == 100 and "30 of 30" in run.artifacts["progress-slow"].description
    rows = run.artifacts["metrics"].data.splitlines()[2:]
    assert rows == ["| last | score | 1 |", "| slow | loss | 0.5 |", "| slow | of.a | 1 |", "| slow | of.b | 2.25 |"]
    assert (root / "reports/report.html").as_uri() in run.artifacts["report"].data
    shown = run.artifacts["run"].data
    assert "| slow | Completed | `runtime/wandb/offline-run-1` |" in shown and "Profile `params.yaml`, no overrides." in shown


def test_cached_restored_and_ran(done_root: Path) -> None:
    root = done_root
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


def test_what_status_calls_unchanged_runs_when_something_before_it_ran_otherwise(done_root: Path) -> None:
    root = done_root
    (root / "raw.txt").write_text("another row\n")
    # by `dvc status` only prepare has changed; what the two make of it is the same again
    assert go().result() == ALL | {"last": "Cached"}


def test_a_failure_carries_its_last_lines_and_what_follows_is_skipped(root: Path) -> None:
    """A stage that fails, one that takes too long, one that is tried again."""
    change(root, "timeout: 600", "timeout: 10", "dvc.yaml")
    change(root, "slow: {seconds: 0.5", "slow: {seconds: 60")
    change(
        root,
        'if stage == "stubborn":\n',
        'if stage == "stubborn":\n    for n in range(40): print("line", n)\n    print(params["none"])\n',
        "work.py",
    )
    state = go()
    assert (
        state.is_failed()
        and state.message.startswith("slow, stubborn failed: slow took longer than its 10 s")
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
    assert "KeyError: 'none'" in said and "exited with 1" in said
    first, *rest = said.removeprefix("Task run encountered an exception RuntimeError: ").splitlines()
    assert first == "stubborn failed" and len(rest) == 20 and rest[0].startswith("line ") and "line 39" in rest
    assert len(project.pids(root, "stubborn")) == 2 and len(project.pids(root, "slow")) == 1, "retries: 1 and retries: 0"
    # The run has ended; what it killed may take a moment to leave the table of processes.
    wait(lambda: not any(psutil.pid_exists(pid) for pid in project.pids(root, "slow")), 10, "the stage that took too long to be gone")


def test_a_stage_that_refuses_is_not_tried_again_and_what_was_there_stays(done_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = done_root
    change(root, 'sys.exit("last: it was told to fail")', "sys.exit(int(os.environ.get('CODE', 2)))", "work.py")
    change(root, "    outs: [reports/report.html]\n", "    outs: [reports/report.html]\n    meta: {cf: {retries: 1}}\n", "dvc.yaml")
    change(root, "fail: false", "fail: true")
    assert go().is_failed()
    assert len(project.pids(root, "last")) == 2, "once well, once not"
    assert (root / "reports/report.html").read_text() == "<p>report</p>", "DVC had removed it"
    monkeypatch.setenv("CODE", "20")  # no refusal
    assert go().is_failed()
    assert len(project.pids(root, "last")) == 4


def test_a_torn_record_of_dvcs_locks_is_mended_and_dvcs_reason_is_the_runs(root: Path) -> None:
    """A kill while DVC writes .dvc/tmp/rwlock leaves it empty, and every dvc after it fails."""
    rwlock = root / ".dvc/tmp/rwlock"
    rwlock.parent.mkdir(exist_ok=True)
    rwlock.write_text("")
    assert "JSON structure is corrupted" in project.dvc(root, "repro", "prepare", code=255)
    assert go(to_stage="prepare").result() == {"prepare": "Completed"}
    change(root, "deps: [raw.txt, work.py]", "deps: [raw.txt, work.py, none.txt]", "dvc.yaml")
    state = go()
    assert state.is_failed() and re.match("prepare failed: .*No such file or directory: .*none.txt", state.message), state.message
    assert state.message.endswith("skipped: slow, stubborn, last"), "also what comes after a skipped stage"
    assert {name: word for name, (_, word) in seen(state).states().items()} == dict.fromkeys(ALL, "Skipped") | {"prepare": "Failed"}
    assert not [log.message for log in seen(state).logs if "without a word" in log.message], "of `dvc checkout` neither"


def test_parameters_are_checked_first(root: Path) -> None:
    change(root, "seed: 1", "seed: -1")
    state = go()
    assert state.is_failed() and state.message == "params.yaml: seed is -1; it must be 0 or more"
    assert seen(state).tasks == {} and not (root / "trace").exists()
    command = [python_folder() / "python", "-c", FLOW]
    env = project.environment(PREFECT_API_URL=str(get_current_settings().api.url))
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and said.splitlines()[-1] == f"pipeline: {state.message}"
    assert said.count("it must be 0 or more") == 1 and "Traceback" not in said


def test_parameters_are_checked_once(root: Path) -> None:
    """By the stage that does nothing else, which is not run a second time; and not at all where nothing has changed."""
    stage = "  validate: {cmd: python -m tasks validate --out out.json, params: [params.yaml: ], outs: [out.json: {cache: false}]}\n"
    change(root, "  slow:\n", f"{stage}  slow:\n", "dvc.yaml")
    asks = 'elif words[:1] == ["validate"]:\n'
    change(root, asks, asks + '    open("checked", "a").write("x")\n', "tasks/__main__.py")
    assert go(to_stage="validate").result() == {"validate": "Completed"} and (root / "checked").read_text() == "x"
    assert go(to_stage="prepare").result() == {"prepare": "Completed"} and (root / "checked").read_text() == "x"
    change(root, "seed: 1", "seed: -1")
    state = go(to_stage="validate")
    assert state.message == "params.yaml: seed is -1; it must be 0 or more" and (root / "checked").read_text() == "xx"


def test_a_part_of_the_stages_and_only_saying_so(root: Path) -> None:
    assert go(dry_run=True).result() == dict.fromkeys(project.STAGES, "Would run")
    assert not (root / "trace").exists() and not (root / "dvc.lock").exists()
    assert go(to_stage="slow").result() == {"prepare": "Completed", "slow": "Completed"}
    assert go(from_stage="stubborn", at_once=1).result() == {"stubborn": "Completed", "last": "Completed"}
    change(root, "rate: 2.0e-6", "rate: 3.0e-6")
    state = go(dry_run=True)
    assert state.result() == {"prepare": "Cached", "slow": "Would run", "stubborn": "Cached", "last": "Would run"}
    rows = {row["stage"]: row["why"] for row in shown_rows(seen(state).artifacts["dry-run"])}
    assert rows == {"prepare": "nothing changed", "slow": "it changed", "stubborn": "nothing changed", "last": "after slow"}
    assert go(stages=["last", "prepare"]).result() == {"prepare": "Cached", "last": "Cached"}, "slow was not asked for"
    state = go(stages=["slwo"])
    assert state.is_failed() and state.message == "slwo is no stage; did you mean slow? Known are prepare, slow, stubborn, last"


def test_another_profile_runs_elsewhere_and_can_be_repeated_from_its_branch(done_root: Path, tmp_path: Path) -> None:
    root = done_root
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "made")
    state = go(profile="smoke", overrides=["last.times=4", "slow.rate=3e-6"])
    assert state.result() == {"prepare": "Restored", "slow": "Completed", "stubborn": "Completed", "last": "Completed"}
    assert project.git(root, "status", "--porcelain") == "", "the checkout is nobody's workplace"
    (folder,) = worktree.list_worktrees(root)
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{8}", folder.name) and 'score": 4' in (folder / "metrics/last.json").read_text()
    branch = f"run/{folder.name}"
    assert project.git(root, "diff", "--name-only", "main", branch).split() == ["dvc.lock", "metrics/last.json", "params.yaml"]
    said = project.dvc(folder, "repro")
    assert "Running stage" not in said and said.count("didn't change, skipping") == 4
    # and from the branch alone, anywhere
    clone = tmp_path / "clone"
    project.git(root, "worktree", "add", "-q", "--detach", str(clone), branch)
    dvc_config.share_cache(root, clone)
    assert "Running stage" not in project.dvc(clone, "repro")
    assert project.git(clone, "status", "--porcelain") == ""
    runtime = [log.message for log in seen(state).logs if branch in log.message]
    assert len(runtime) == 1 and "repeats it" in runtime[0]


def test_a_value_that_is_no_parameter_fails_before_anything_runs(root: Path) -> None:
    state = go(overrides=["slow.rat=1"])
    assert state.is_failed() and state.message == "slow.rat is not a parameter of params.yaml; did you mean slow.rate?"
    assert seen(state).tasks == {}


def test_one_run_a_checkout(root: Path) -> None:
    with run_lock.hold_checkout(root):
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


def test_a_push_that_fails_fails_the_run_and_no_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Path] = []

    def push(at: Path, *, return_state: bool) -> State[None]:
        pushed.append(at)
        return Failed(message="Task run encountered an exception Away: remote lab doesn't answer")

    monkeypatch.setattr(dvc_remote, "push_task", push)
    state = go(to_stage="prepare", push=True)
    assert state.is_failed() and pushed == [root]
    assert (state.message or "").startswith("the stages are finished and not sent: remote lab doesn't answer; `cf remote push` in ")
    assert seen(state).states() == {"prepare": ("COMPLETED", "Completed")}


def test_stages_get_no_password_and_leave_what_outlives_their_worktree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "CF_ALERT_URL"):
        monkeypatch.setenv(name, "planted")
    for name in ("CF_RUN", "WANDB_DIR", "CF_KEPT"):
        monkeypatch.delenv(name, raising=False)
    made = stage_environment("a-run", tmp_path / ".runs/a-run", tmp_path)
    assert "planted" not in made.values()
    assert made["CF_RUN"] == "a-run" and made["PYTHONUNBUFFERED"] == "1"
    assert made["WANDB_DIR"] == str(tmp_path / "runtime") and made["CF_KEPT"] == str(tmp_path / "work/kept")
    assert "WANDB_DIR" not in stage_environment("a-run", tmp_path, tmp_path)
