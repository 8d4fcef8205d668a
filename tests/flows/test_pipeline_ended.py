"""Runs that are cancelled and killed: nothing of them stays at work, and nothing stays open in Prefect."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_sync
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from flows.pipeline import pipeline
from flows.project import run_lock
from flows.run.config import RunConfig
from tests.flows import project
from tests.flows.served import ALL, Seen, change, go, root

pytestmark = pytest.mark.slow
__all__ = ["root"]  # a fixture


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
    while at_work(root) and time.monotonic() - ended < 120:
        time.sleep(0.05)
    took = time.monotonic() - ended
    assert took < 60, f"{at_work(root)} lived for {took:.1f} s"
    process.wait(120)
    # the next run in this checkout begins, and closes what the dead one left
    before = re.findall(r"Beginning flow run '([\w-]+)'", (root.parent / "said").read_text())
    change(root, "seconds: 300", "seconds: 0.1")
    assert go().result() == ALL | {"prepare": "Cached"}
    with get_client(sync_client=True) as client:
        (dead,) = [run for run in client.read_flow_runs(limit=50) if run.name in before]
        assert dead.state is not None and dead.state.is_final(), dead.state
        # a task that never began has its name with a number after it
        states = {name.split("-")[0]: state for name, state in Seen(dead.id).states().items()}
    assert how != "SIGKILL" or dead.state.type.value == "CRASHED"
    ended = ("CRASHED", "Crashed") if how == "SIGKILL" else ("CANCELLED", "Cancelled")
    assert states == {"prepare": ("COMPLETED", "Completed"), "slow": ended, "stubborn": ended, "last": ("CANCELLED", "Skipped")}


def test_a_dead_run_that_is_tried_again_does_not_close_itself(root: Path) -> None:
    """Prefect's Retry: the same flow run, in a checkout that still holds its name."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(pipeline, parameters={"config": RunConfig(dry_run=True)}, state=Running())
    with pytest.raises(KeyboardInterrupt), run_lock.hold_checkout(root, str(run.id)):
        raise KeyboardInterrupt
    state = run_flow_sync(pipeline, flow_run=run, parameters={"config": RunConfig(dry_run=True)}, return_type="state")
    assert state.is_completed()
    with get_client(sync_client=True) as client:
        history = client.read_flow_run_states(run.id)
    assert "CRASHED" not in [one.type.value for one in history]
