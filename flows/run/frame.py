"""What a run does first: it ends and closes what runs before it left when they died."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.machine import reconcile
from flows.project import run_lock, worktree
from flows.supervise import command


def tidy(repo: Path) -> None:
    """What runs before this one left: processes without a guardian, runs and tasks that say Running for ever."""
    logger = get_run_logger()
    if left := command.sweep():
        logger.warning(f"ended processes that a killed run had left: {', '.join(map(str, left))}")
    try:
        with get_client(sync_client=True) as client:
            for run in {run_lock.died(root) for root in [repo, *worktree.found(repo)]} - {"", str(runtime.flow_run.id)}:
                _close(client, UUID(run))  # this one too may have died before, and is being tried again
            for said in reconcile.tasks_of_the_dead(client):
                logger.info(said)
    except Exception as error:
        logger.warning(f"tasks of runs that died were not closed: {' '.join(str(error).split())[:200]}")


def _close(client: SyncPrefectClient, run: UUID) -> None:
    """A run that had its checkout when its process was killed. It may have ended well for the server, or be another server's."""
    try:
        state = client.read_flow_run(run).state
    except ObjectNotFound:
        return
    if state is None or state.is_running() or state.is_cancelling():  # not one that waits to be tried again
        client.set_flow_run_state(run, Crashed(message="Its process was gone when the next run began."), force=True)
