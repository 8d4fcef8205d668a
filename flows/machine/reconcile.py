"""Closing of runs whose process is gone: flow runs that died with their worker, and the tasks of any run that died.

Prefect leaves a task of a crashed run at Running for ever. `close_tasks` is a hook for the flows; the worker does the rest at its start.
"""

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from flows.machine import alerts, processes

OPEN = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
DIED = [StateType.CRASHED, StateType.CANCELLED, StateType.FAILED]


def find_dead_runs(client: SyncPrefectClient, root: Path, silent: timedelta = timedelta(0)) -> list[FlowRun]:
    """Find open runs that this machine's worker took and that have no process here.

    Runs whose state is younger than `silent` are left out: beside a worker, a run that it has just taken has no process yet.
    """
    open_runs: list[FlowRun] = client.read_flow_runs(flow_run_filter=filter_runs("type", OPEN))
    alive, submitted, now = processes.find_run_processes(root), read_taken_runs(root), datetime.now(UTC)
    old = [run for run in open_runs if run.state is None or now - run.state.timestamp >= silent]
    return [run for run in old if str(run.id) in submitted and str(run.id) not in alive]


def close_dead_runs(client: SyncPrefectClient, root: Path, silent: timedelta = timedelta(0)) -> list[str]:
    """Set dead runs to Crashed, or Cancelled where that was asked for, and send the alert of a night; return a sentence for each."""
    sentences = []
    for run in find_dead_runs(client, root, silent):
        cancelled = run.state_type == StateType.CANCELLING
        message = "Its processes were gone when the machine was started or stopped."
        state: State[Any] = Cancelled(message=message) if cancelled else Crashed(message=message)
        client.set_flow_run_state(run.id, state, force=True)
        sentences.append(f"run {run.name} had died: it is {state.name} now")
        if not cancelled and client.read_flow(run.flow_id).name == "nightly":  # the worker, which calls the hooks, died too
            alerts.on_crashed(None, run, state)
    return sentences


def read_taken_runs(root: Path) -> set[str]:
    """Read from the worker's log the ids of the runs that this machine took; the server doesn't know which worker it was."""
    ids: set[str] = set()
    for log in (root / ".machine").glob("worker.log*"):  # and worker.log.1, the older one
        with log.open(errors="replace") as lines:
            ids.update(run for line in lines for run in re.findall(r"submitting flow run '([0-9a-f-]{36})'", line))
    return ids


def close_dead_tasks(client: SyncPrefectClient, run: UUID | None = None) -> list[str]:
    """Set open tasks of a run, or of all runs that died, to Crashed, and to Skipped where they had not begun."""
    runs = filters.FlowRunFilter.model_validate({"id": {"any_": [run]}}) if run else filter_runs("type", DIED)
    at_work = filters.TaskRunFilter.model_validate({"state": {"type": {"any_": OPEN}}})
    sentences = []
    for task in client.read_task_runs(flow_run_filter=runs, task_run_filter=at_work):
        state: State[Any] = Crashed(message="The run ended while this task was at work.")
        if task.state_type != StateType.RUNNING:
            state = Cancelled(name="Skipped", message="The run ended before this task began.")
        client.set_task_run_state(task.id, state, force=True)
        sentences.append(f"task {task.name} of a run that died: it is {state.name} now")
    return sentences


def close_tasks(flow: object, flow_run: FlowRun, state: State[Any]) -> None:
    """Close the tasks of a run; for @flow(on_crashed=..., on_cancellation=...), called by the worker when the flow's process is gone."""
    with get_client(sync_client=True) as client:
        close_dead_tasks(client, flow_run.id)


def filter_runs(field: str, values: Sequence[str]) -> filters.FlowRunFilter:
    """Return Prefect's filter of the flow runs whose state's `field`, its type or its name, is one of `values`."""
    return filters.FlowRunFilter.model_validate({"state": {field: {"any_": values}}})


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        for sentence in [*close_dead_runs(client, Path(sys.argv[1])), *close_dead_tasks(client)]:
            print(sentence)
