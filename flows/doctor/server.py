"""What `cf doctor` asks the Prefect server: is anybody there to work, does what has a cron get runs, is anything stuck? And whether
somebody would be told.

Imported after the environment says where the server is (flows/doctor/command.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import prefect
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse

from flows.doctor.finding import Line
from flows.machine import alerts, processes, reconcile
from flows.machine.settings import Machine, is_healthy
from flows.machine.up import POOL, since

SOON = timedelta(seconds=120)  # the scheduler looks every minute
DAY = timedelta(hours=26)

if TYPE_CHECKING:
    from flows.doctor.finding import Check


def check_server(machine: Machine, fix: bool) -> Iterator[Line]:
    """All of it, or one line that there is no server: a checkout needs none for `make repro`."""
    if not is_healthy(machine):
        died = machine.file("server.pid").exists()
        said = f"no server answers at {machine.url}"
        yield Line("server", "fail" if died else "warn", said, "`make up` starts it" + ("; it had died" if died else ""))
        return
    with get_client(sync_client=True) as client:
        version = client.api_version()
        same = version == prefect.__version__
        yield Line(
            "server",
            "ok" if same else "warn",
            f"{machine.url}, Prefect {version}",
            "" if same else f"here is {prefect.__version__}: `make down up`",
        )
        yield from check_server_log(machine.file("server.log"))
        yield from check_worker(client, machine)
        yield from check_schedules(client)
        yield from check_stuck_runs(client, machine, fix)


def check_alerts(machine: Machine, fix: bool) -> Iterator[Line]:
    """Who is told is in the environment that `cf up` was given, so that is what counts."""
    for name, of in (("worker", "a night that fails"), ("watch", "a night that doesn't happen")):
        process = processes.noted(machine.file(f"{name}.pid"))
        if process and alerts.ALERT_URL not in process.environ():
            yield Line("alerts", "warn", f"nobody is told of {of}", f"{alerts.ALERT_URL}=https://... make down up")
        elif process:
            yield Line("alerts", "ok", f"someone is told of {of}")
        elif name == "watch" and processes.noted(machine.file("worker.pid")):
            yield Line("alerts", "fail", f"nobody looks for {of}", "`make up` starts the watch")


CHECKS: list[Check] = [check_server, check_alerts]


def check_server_log(log: Path) -> Iterator[Line]:
    """The scheduler's failures are to be seen nowhere else."""
    text = since(log) if log.exists() else ""
    text = text.rpartition("Check out the dashboard")[2]  # since it was started last
    lines = [line for line in text.splitlines() if "| ERROR " in line]
    if lines:
        yield Line("server", "warn", f"{len(lines)} errors in its log, the last: {lines[-1][:160]}", f"see {log}")


def check_worker(client: SyncPrefectClient, machine: Machine) -> Iterator[Line]:
    pool = next((pool for pool in client.read_work_pools() if pool.name == POOL), None)
    if pool is None:
        yield Line("worker", "fail", f"the server has no work pool {POOL}", "`make up` starts a worker, which makes it")
        return
    if pool.is_paused:
        yield Line("worker", "fail", f"the work pool {POOL} is paused: nothing starts", f"prefect work-pool resume {POOL}")
    own = processes.noted(machine.file("worker.pid"))
    late = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Late"]))))
    if own is None:
        waiting = f"; {len(late)} runs are late" if late else ""
        yield Line("worker", "fail" if late else "warn", f"none of this checkout runs{waiting}", "`make up` starts it")
    elif own.status() == psutil.STATUS_STOPPED:
        yield Line("worker", "fail", f"process {own.pid} is stopped and takes no run: a `cf down` was killed", "`make up` wakes it")
    elif late:
        yield Line(
            "worker", "warn", f"process {own.pid}; {len(late)} runs are late", "they wait for the run that is at work, or CF_RUNS=2 make up"
        )
    else:
        yield Line("worker", "ok", f"process {own.pid}, pool {POOL}")


def check_schedules(client: SyncPrefectClient) -> Iterator[Line]:
    """A deployment with a cron and without one run ahead of it is the failure that nobody sees until a month is gone."""
    deployments = client.read_deployments()
    if not deployments:
        yield Line("deployments", "warn", "none", "`make deploy` sends them")
    for one in deployments:
        active = [schedule for schedule in one.schedules if schedule.active]
        if not active or one.paused:
            paused = Line("deployments", "warn", f"{one.name} has a schedule that is paused", "resume it in the UI")
            yield paused if one.schedules else Line("deployments", "ok", f"{one.name}: on demand")
            continue
        yield from check_schedule(client, one)


def check_schedule(client: SyncPrefectClient, one: DeploymentResponse) -> Iterator[Line]:
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[one.id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))),
    )
    ahead = sorted(run.expected_start_time for run in runs if run.auto_scheduled and run.expected_start_time)
    now = datetime.now(UTC)
    if ahead:
        yield Line("deployments", "ok", f"{one.name}: next at {ahead[0]:%Y-%m-%d %H:%M} UTC")
    elif one.updated and now - one.updated < SOON:
        yield Line("deployments", "ok", f"{one.name}: deployed a moment ago, not scheduled yet")
    else:
        todo = "check the line `versions`, then `make down up`; the server's log says why its scheduler fails"
        yield Line("deployments", "fail", f"{one.name} has a schedule and no run ahead: it will never run", todo)
    done = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[one.id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))),
    )
    latest = max((run.end_time for run in done if run.end_time), default=one.created)
    if latest and now - latest > DAY:
        yield Line("deployments", "warn", f"{one.name} has not completed since {latest:%Y-%m-%d %H:%M} UTC", "see its runs in the UI")


def check_stuck_runs(client: SyncPrefectClient, machine: Machine, fix: bool) -> Iterator[Line]:
    """Runs that say Running and have no process here, and slots that nobody holds."""
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=reconcile.OPEN))
    open_runs: list[FlowRun] = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=states))
    dead = [run.name for run in reconcile.find_dead_runs(client, machine.root, SOON)]
    if dead and fix:
        for said in reconcile.close_dead_runs(client, machine.root, SOON):
            yield Line("stuck", "ok", said)
    elif dead:
        yield Line("stuck", "warn", f"said to be at work, and dead: {', '.join(dead)}", "`cf doctor --fix` closes them")
    for limit in client.read_global_concurrency_limits(limit=100, offset=0):
        if limit.active_slots and not open_runs:
            todo = f"prefect gcl update {limit.name} --active-slots 0"
            yield Line(
                "stuck", "fail", f"{limit.name} has {limit.active_slots} slots taken and nothing runs: the next run waits for ever", todo
            )
    if not dead:
        yield Line("stuck", "ok", f"{len(open_runs)} runs at work")
