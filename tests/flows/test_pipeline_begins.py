"""What the flow does before its stages and says after them: what a dead run left, what it refuses, what DVC's words mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from prefect.states import AwaitingRetry, Running

from flows import stage_task, stages, worktree
from flows.pipeline import pipeline
from tests.flows import project
from tests.flows.served import go, root, server

pytestmark = pytest.mark.slow
__all__ = ["root", "server"]  # fixtures


def test_a_lock_that_a_killed_run_left_is_put_in_order(root: Path) -> None:
    project.dvc(root, "repro", "-q", "slow")
    project.dvc(root, "repro", "-q")
    whole = (root / "dvc.lock").read_text()
    project.git(root, "clean", "-qfd", "--", "dvc.lock")
    for stage in ("prepare", "stubborn"):
        project.dvc(root, "repro", "-q", "-s", stage)
    assert go().is_completed()
    assert stages.recorded((root / "dvc.lock").read_text()) == project.STAGES == stages.recorded(whole)


def test_a_run_that_waits_to_be_tried_again_is_left_alone(root: Path) -> None:
    with get_client(sync_client=True) as client:
        waits, died = (client.create_flow_run(pipeline, state=state) for state in (AwaitingRetry(), Running()))
        for run, name in ((waits, "a"), (died, "b")):
            folder = worktree.make(root, name, profile=None, overrides={})
            (folder / worktree.LOCK).parent.mkdir(exist_ok=True, parents=True)
            (folder / worktree.LOCK).write_text(f"1 {run.id}")
        assert go(dry_run=True).is_completed()
        states = [client.read_flow_run(run.id).state for run in (waits, died)]
    assert [state and state.name for state in states] == ["AwaitingRetry", "Crashed"]


def test_what_dvc_says_as_a_state() -> None:
    pulled = ["Pulling data for stage: 'slow'", "A       models/slow/"]
    assert stage_task.outcome("slow", pulled) == "Restored"
    assert stage_task.outcome("slow", [*pulled, "Running stage 'slow':"]) == "Completed"
    assert stage_task.outcome("slow", ["Running stage 'slow':", "Stage 'slow' is cached - skipping run"]) == "Completed"
    assert stage_task.outcome("slow", ["Stage 'slow' didn't change, skipping"]) == "Cached"


def test_the_command_refuses_in_a_sentence(root: Path, tmp_path: Path) -> None:
    for words, folder, said in (
        (["--set", "slow.rate"], root, "the override 'slow.rate' is not key=value"),
        (["--set", "a=[&x 1, *x]"], root, "the override a has an anchor or an alias of YAML"),
        (["--stages", "a b"], root, "stages.0 is 'a b': is no stage's name"),
        ([], tmp_path, f"pipeline: {tmp_path} has no dvc.yaml; run this at the root of the project"),
    ):
        command = [sys.executable, "-m", "flows.pipeline", *words]
        env = project.environment(PREFECT_API_URL=str(get_current_settings().api.url))
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / ".dvc").exists()
