"""What `cf doctor` asks the Prefect server and supervisor: what runs, whether what has a cron gets runs, and what is stuck.

Imported after the environment says where the server is (flows/doctor/command.py), because Prefect reads that when it is imported.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import prefect
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse

from flows.doctor.finding import Finding
from flows.machine import alerts, programs, reconcile
from flows.machine.settings import Machine, is_healthy
from flows.machine.up import POOL
from tasks.files.words import count_things

SOON = timedelta(seconds=120)  # the scheduler looks every minute
DAY = timedelta(hours=26)


def check_server(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check the server and all it knows. Without a server that is one warning, because `make repro` needs none."""
    if not is_healthy(machine):
        yield Finding("server", "warn", f"no server answers at {machine.url}", "`make up` starts it")
        return
    with get_client(sync_client=True) as client:
        version = client.api_version()
        todo = "" if version == prefect.__version__ else f"here is {prefect.__version__}: `make down up`"
        yield Finding("server", "warn" if todo else "ok", f"{machine.url}, Prefect {version}", todo)
        yield from check_server_log(machine.file("server.log"))
        yield from check_worker(client, machine)
        yield from check_schedules(client)
        yield from check_stuck_runs(client, machine, fix)


def check_programs(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check that supervisor runs, unless it was taken down, and that it has given no program up."""
    states = programs.read_states(machine)
    if not states and machine.file("supervisor.pid").exists():  # which supervisor removes when it is taken down
        yield Finding("supervisor", "fail", "it had died, and nothing restarts what dies", "`make up` starts it")
    for name, state in states.items():
        if state not in programs.RUNNING:
            yield Finding("supervisor", "fail", f"the program {name} is {state}", f"see {machine.file(f'{name}.log')}, then `make up`")


def check_alerts(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check that an alert can be sent: what counts is the environment that `cf up` was given, which its programs have."""
    for name, event in (("worker", "a night that fails"), ("watch", "a night that doesn't happen")):
        process = programs.find_process(machine, name)
        if process and alerts.ALERT_URL not in process.environ():
            yield Finding("alerts", "warn", f"nobody is told of {event}", f"{alerts.ALERT_URL}=https://... make down up")
        elif process:
            yield Finding("alerts", "ok", f"someone is told of {event}")


def check_server_log(log: Path) -> Iterator[Finding]:
    """Find errors that the server logged since its last start; failures of its scheduler are to be seen nowhere else."""
    text = programs.read_log(log).rpartition("Check out the dashboard")[2]
    errors = [line for line in text.splitlines() if "| ERROR " in line]
    if errors:
        yield Finding("server", "warn", f"{count_things(len(errors), 'error')} in its log, the last: {errors[-1][:160]}", f"see {log}")


def check_worker(client: SyncPrefectClient, machine: Machine) -> Iterator[Finding]:
    """Check that somebody takes the runs of the work pool."""
    pool = next((pool for pool in client.read_work_pools() if pool.name == POOL), None)
    if pool is None:
        yield Finding("worker", "fail", f"the server has no work pool {POOL}", "`make up` starts a worker, which makes it")
        return
    if pool.is_paused:
        yield Finding("worker", "fail", f"the work pool {POOL} is paused: nothing starts", f"prefect work-pool resume {POOL}")
    process = programs.find_process(machine, "worker")
    late = client.read_flow_runs(flow_run_filter=reconcile.filter_runs("name", ["Late"]))
    text = f"process {process.pid}, pool {POOL}" if process else "none of this checkout runs"
    text += f"; {count_things(len(late), 'run')} late" if late else ""
    if process is None:
        yield Finding("worker", "fail" if late else "warn", text, "`make up` starts it")
    else:
        todo = "what is late waits for the run that is at work, or CF_RUNS=2 make down up" if late else ""
        yield Finding("worker", "warn" if late else "ok", text, todo)


def check_schedules(client: SyncPrefectClient) -> Iterator[Finding]:
    """Check that every deployment with a cron has a run ahead: without one nothing else tells until a month is gone."""
    deployments = client.read_deployments()
    if not deployments:
        yield Finding("deployments", "warn", "none", "`make deploy` sends them")
    for deployment in deployments:
        if not deployment.schedules:
            yield Finding("deployments", "ok", f"{deployment.name}: on demand")
        elif deployment.paused or not any(schedule.active for schedule in deployment.schedules):
            yield Finding("deployments", "warn", f"{deployment.name} has a schedule that is paused", "resume it in the UI")
        else:
            yield from check_schedule(client, deployment)


def check_schedule(client: SyncPrefectClient, deployment: DeploymentResponse) -> Iterator[Finding]:
    """Check one deployment with a cron: its next run, and when it completed last."""
    scheduled = _read_runs(client, deployment, StateType.SCHEDULED)
    ahead = sorted(run.expected_start_time for run in scheduled if run.auto_scheduled and run.expected_start_time)
    now = datetime.now(UTC)
    if ahead:
        yield Finding("deployments", "ok", f"{deployment.name}: next at {ahead[0]:%Y-%m-%d %H:%M} UTC")
    elif deployment.updated and now - deployment.updated < SOON:
        yield Finding("deployments", "ok", f"{deployment.name}: deployed a moment ago, not scheduled yet")
    else:
        todo = "check the line `versions`, then `make down up`; the server's log says why its scheduler fails"
        yield Finding("deployments", "fail", f"{deployment.name} has a schedule and no run ahead: it will never run", todo)
    completed = _read_runs(client, deployment, StateType.COMPLETED)
    latest = max((run.end_time for run in completed if run.end_time), default=deployment.created)
    if latest and now - latest > DAY:
        text = f"{deployment.name} has not completed since {latest:%Y-%m-%d %H:%M} UTC"
        yield Finding("deployments", "warn", text, "see its runs in the UI")


def _read_runs(client: SyncPrefectClient, deployment: DeploymentResponse, state: StateType) -> list[FlowRun]:
    of_deployment = DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}})
    return client.read_flow_runs(deployment_filter=of_deployment, flow_run_filter=reconcile.filter_runs("type", [state]))


def check_stuck_runs(client: SyncPrefectClient, machine: Machine, fix: bool) -> Iterator[Finding]:
    """Find runs that say Running and have no process here, and slots that no run holds."""
    open_runs = client.read_flow_runs(flow_run_filter=reconcile.filter_runs("type", reconcile.OPEN))
    dead = [run.name for run in reconcile.find_dead_runs(client, machine.root, SOON)]
    if dead and fix:
        for sentence in reconcile.close_dead_runs(client, machine.root, SOON):
            yield Finding("stuck", "ok", sentence)
    elif dead:
        yield Finding("stuck", "warn", f"said to be at work, and dead: {', '.join(dead)}", "`cf doctor --fix` closes them")
    for limit in client.read_global_concurrency_limits(limit=100, offset=0):
        if limit.active_slots and not open_runs:
            text = f"{limit.name} has {count_things(limit.active_slots, 'slot')} taken and nothing runs: the next run waits for ever"
            yield Finding("stuck", "fail", text, f"prefect gcl update {limit.name} --active-slots 0")
    if not dead:
        yield Finding("stuck", "ok", f"{count_things(len(open_runs), 'run')} at work")
