"""What the flow does before its stages and says after them: what a dead run left, what it refuses, what DVC's words mean."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from prefect.states import AwaitingRetry, Running

from flows.pipeline import pipeline
from flows.project import dvc_graph, dvc_lock, run_lock, worktree
from flows.run import artifacts, stage_task
from flows.run.repro import nearest_upstream as waits_for
from flows.supervise import command as supervise
from tests.flows import project
from tests.flows.served import go, root
from tests.preloaded import FLOW, python_folder

pytestmark = pytest.mark.slow
__all__ = ["root"]  # a fixture


def test_a_lock_that_a_killed_run_left_is_put_in_order(root: Path) -> None:
    project.dvc(root, "repro", "-q", "slow")
    project.dvc(root, "repro", "-q")
    whole = (root / "dvc.lock").read_text()
    project.git(root, "clean", "-qfd", "--", "dvc.lock")
    for stage in ("prepare", "stubborn"):
        project.dvc(root, "repro", "-q", "-s", stage)
    assert go().is_completed()
    assert dvc_lock.list_recorded((root / "dvc.lock").read_text()) == project.STAGES == dvc_lock.list_recorded(whole)


def test_a_run_that_waits_to_be_tried_again_is_left_alone(root: Path) -> None:
    with get_client(sync_client=True) as client:
        waits, died = (client.create_flow_run(pipeline, state=state) for state in (AwaitingRetry(), Running()))
        for run, name in ((waits, "a"), (died, "b")):
            folder = worktree.make_worktree(root, name, profile=None, overrides={})
            (folder / run_lock.LOCK).parent.mkdir(exist_ok=True, parents=True)
            (folder / run_lock.LOCK).write_text(f"1 {run.id}")
        assert go(dry_run=True).is_completed()
        states = [client.read_flow_run(run.id).state for run in (waits, died)]
    assert [state and state.name for state in states] == ["AwaitingRetry", "Crashed"]


def test_what_the_remote_can_not_give_is_made_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there when the run began, and went away."""
    really, asked = stage_task.repro_stage, list[bool]()

    def away(stage: Any, run: Any, log: Any, *, pull: bool) -> int:
        asked.append(pull)
        return 255 if pull else really(stage, run, log, pull=False)

    monkeypatch.setattr("flows.pipeline.remote_answers", lambda _: True)
    monkeypatch.setattr(stage_task, "repro_stage", away)
    assert go(pull=True, to_stage="prepare").result() == {"prepare": "Completed"} and asked == [True, False]


def test_what_dvc_says_as_a_state() -> None:
    pulled = ["Pulling data for stage: 'slow'", "A       models/slow/"]
    assert stage_task.read_outcome("slow", pulled) == "Restored"
    assert stage_task.read_outcome("slow", [*pulled, "Running stage 'slow':"]) == "Completed"
    assert stage_task.read_outcome("slow", ["Running stage 'slow':", "Stage 'slow' is cached - skipping run"]) == "Completed"
    assert stage_task.read_outcome("slow", ["Stage 'slow' didn't change, skipping"]) == "Cached"


def test_the_command_refuses_in_a_sentence(root: Path, tmp_path: Path) -> None:
    for words, folder, said in (
        (["--set", "slow.rate"], root, "the override 'slow.rate' is not key=value"),
        (["--set", "a=[&x 1, *x]"], root, "the override a has an anchor or an alias of YAML"),
        (["--stages", "a b"], root, "stages.0 is 'a b': is no stage's name"),
        ([], tmp_path, f"pipeline: {tmp_path} has no dvc.yaml; run this at the root of the project"),
    ):
        command = [python_folder() / "python", "-c", FLOW, *words]
        env = project.environment(PREFECT_API_URL=str(get_current_settings().api.url))
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / ".dvc").exists()


# ------------------------------------------------------------------------------------------------- without a server


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return project.make(tmp_path / "plain")


def test_a_stage_waits_for_the_nearest_of_those_that_run(plain: Path) -> None:
    known = dvc_graph.read_graph(plain)
    last = next(stage for stage in known if stage.name == "last")
    assert waits_for(last, known, {"prepare", "last"}) == ("prepare",)
    assert waits_for(last, known, {"slow", "prepare", "last"}) == ("slow", "prepare")


def test_every_stage_waits_for_dvcs_lock(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, results were lost: the lock is held for as long as another stage's outs are hashed."""
    asked: list[list[str]] = []
    monkeypatch.setattr(stage_task.command, "run", lambda words, **_: asked.append(words) or 0)
    run = stage_task.SharedRun(plain, {}, set(), threading.Semaphore(1), pull=True)
    graph = dvc_graph.read_graph(plain)
    slow = graph[1]
    for pull in (True, False):
        assert stage_task.repro_stage(slow, run, print, pull=pull) == 0
    common = ["-m", "dvc", "--wait-for-lock", "repro"]
    assert [words[1:] for words in asked] == [[*common, "--pull", "--single-item", "slow"], [*common, "--single-item", "slow"]]
    held = "import sys, time; from dvc.repo import Repo; Repo('.').lock.lock(); print('held', flush=True); time.sleep(5)"
    with subprocess.Popen([sys.executable, "-c", held], cwd=plain, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert dvc_graph.find_unchanged(plain, graph) == set()


@pytest.mark.parametrize(("words", "said"), [
    ([], "4 stages, 4 done; ran: none"),
    (["--from", "slow", "--pull"], "2 stages, 2 done; ran: none"),
    (["--to", "slow", "--dry-run"], "2 stages; would run: none"),
])  # fmt: skip
def test_a_run_with_nothing_to_do_starts_no_server(tmp_path: Path, words: list[str], said: str) -> None:
    """It took 23 s of CPU, of which `dvc status` is two."""
    root = project.make_done(tmp_path / "done")
    (root / "tasks/validate.py").unlink()  # else params.yaml is checked by a command, because no stage does that here
    env = project.environment(PREFECT_HOME=str(tmp_path / "prefect"))
    done = subprocess.run([python_folder() / "python", "-c", FLOW, *words], cwd=root, env=env, capture_output=True, text=True)
    assert done.stdout == f"{said}\n" and done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "prefect").exists() or not list((tmp_path / "prefect").glob("*.db")), "no server was started"


def test_metrics_begin_with_the_key_numbers_and_the_rest_is_folded(tmp_path: Path) -> None:
    assert artifacts._metrics_text(tmp_path) == ""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/evaluate.json").write_text('{"prompts": {"stage2": {"memory_ratio": 0.61234, "motion": 2}}}')
    first, folded = artifacts._metrics_text(tmp_path).split("\n\n")  # a blank line more, and Prefect's page folds nothing
    assert first.splitlines()[2:] == ["| stage2, memory ratio (0 remembers all) | 0.6123 |"]
    assert folded.startswith("<details><summary>all 2 metrics</summary><table>") and folded.endswith("</table></details>")
    assert "<tr><td>evaluate</td><td>prompts.stage2.memory_ratio</td><td>0.61234</td></tr>" in folded and "prompts.stage2.motion" in folded


def test_a_place_is_not_waited_for_when_the_run_is_stopped() -> None:
    supervise.allow_commands()
    threading.Timer(0.3, supervise.stop_commands).start()
    with pytest.raises(supervise.Stopped), stage_task._hold_slot(threading.Semaphore(0)):
        pass
    supervise.allow_commands()
