"""Runs whose process is gone, told to the server: a flow run that died with its worker, and the tasks of any run that died.

Prefect leaves a task of a crashed run at Running for ever. `close_tasks` is a hook for the flows; `cf up` does the rest.
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from flows.machine import alerts, processes

OPEN = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
DIED = [StateType.CRASHED, StateType.CANCELLED, StateType.FAILED]


def main(root: Path) -> None:
    with get_client(sync_client=True) as client:
        for said in [*close_dead_runs(client, root), *close_dead_tasks(client)]:
            print(said)


def find_dead_runs(client: SyncPrefectClient, root: Path, silent: timedelta = timedelta(0)) -> list[FlowRun]:
    """Open runs that this machine's worker took and that have no process here; not those whose state is younger than `silent`:
    beside a worker, a run that it has just taken has none yet."""
    found: list[FlowRun] = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=_of(OPEN)))
    alive, mine, now = processes.find_run_processes(root), read_taken_runs(root), datetime.now(UTC)
    old = [run for run in found if run.state is None or now - run.state.timestamp >= silent]
    return [run for run in old if str(run.id) in mine and str(run.id) not in alive]


def close_dead_runs(client: SyncPrefectClient, root: Path, silent: timedelta = timedelta(0)) -> list[str]:
    said = []
    for run in find_dead_runs(client, root, silent):
        asked = run.state_type == StateType.CANCELLING
        message = "Its processes were gone when the machine was started or stopped."
        state: State[Any] = Cancelled(message=message) if asked else Crashed(message=message)
        client.set_flow_run_state(run.id, state, force=True)
        said.append(f"run {run.name} had died: it is {state.name} now")
        if not asked and client.read_flow(run.flow_id).name == "nightly":  # no hook has told of it: the worker, which calls them, died too
            alerts.on_crashed(None, run, state)
    return said


def read_taken_runs(root: Path) -> set[str]:
    """Ids of the runs that this machine's worker took, by its log: the server doesn't know which worker it was."""
    found: set[str] = set()
    for log in (root / ".machine").glob("worker.log*"):  # and worker.log.1, the older one
        with log.open(errors="replace") as lines:
            found.update(run for line in lines for run in re.findall(r"submitting flow run '([0-9a-f-]{36})'", line))
    return found


def close_dead_tasks(client: SyncPrefectClient, run: UUID | None = None) -> list[str]:
    one = FlowRunFilterId(any_=[run]) if run else None
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=one, state=_of(DIED) if run is None else None),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=OPEN))),
    )
    said = []
    for task in tasks:
        state: State[Any] = Crashed(message="The run ended while this task was at work.")
        if task.state_type != StateType.RUNNING:
            state = Cancelled(name="Skipped", message="The run ended before this task began.")
        client.set_task_run_state(task.id, state, force=True)
        said.append(f"task {task.name} of a run that died: it is {state.name} now")
    return said


def close_tasks(flow: object, flow_run: FlowRun, state: State[Any]) -> None:
    """For @flow(on_crashed=[close_tasks], on_cancellation=[close_tasks]): the worker calls it when the flow's process is gone."""
    with get_client(sync_client=True) as client:
        close_dead_tasks(client, flow_run.id)


def _of(types: list[StateType]) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=types))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
