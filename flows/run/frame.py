"""What every flow begins and ends with: dead runs are closed first, results are committed, and the log is delivered to the last line."""

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.logging.handlers import APILogWorker
from prefect.states import Crashed, Failed

from flows.machine import reconcile
from flows.project import git, run_lock, worktree
from flows.supervise import command
from tasks.files.dvc_rwlock import mend_rwlock

LOG_PATIENCE = 300.0  # seconds; a restarted server is back within one minute

FlowResult = TypeVar("FlowResult")


def run_framed(body: Callable[[], FlowResult]) -> FlowResult | State[Any]:
    """Run the body of a flow. A refusal or a failed stage (ValueError, RuntimeError) becomes a failed state with its sentence."""
    command.allow_commands()
    try:
        clean_up_after_dead_runs(Path.cwd())
        return body()
    except (RuntimeError, ValueError) as error:
        return Failed(message=str(error))  # returned, not raised: Prefect would prefix the message with the exception's name
    finally:
        command.stop_commands()
        deliver_logs()


def say_failures_once() -> None:
    """Leave out Prefect's log line with a failed run's message, for a command that ends with that message itself."""
    logging.getLogger("prefect.flow_runs").addFilter(lambda record: not record.getMessage().startswith("Finished in state Failed("))


def clean_up_after_dead_runs(repo: Path) -> None:
    """End processes that runs killed before left, and close those runs and their tasks, which would say Running for ever."""
    logger = get_run_logger()
    if ended := command.end_orphans():
        logger.warning(f"ended processes that a killed run had left: {', '.join(map(str, ended))}")
    roots = [repo, *worktree.list_worktrees(repo)]
    for sentence in filter(None, map(mend_rwlock, roots)):
        logger.warning(sentence)
    try:
        with get_client(sync_client=True) as client:
            # without this run itself, which may have died before and is being tried again
            dead = {run_lock.find_dead_run(root) for root in roots} - {"", str(runtime.flow_run.id)}
            for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [*dead]}})):
                # a run that has ended, or waits to be tried again, stays as it is
                if run.state is None or run.state.is_running() or run.state.is_cancelling():
                    client.set_flow_run_state(run.id, Crashed(message="Its process was gone when the next run began."), force=True)
            for line in reconcile.close_dead_tasks(client):
                logger.info(line)
    except Exception as error:
        logger.warning(f"tasks of runs that died were not closed: {' '.join(str(error).split())[:200]}")


def name_run() -> str:
    """Return a name for this run's folder and branch: the flow run's, which the UI shows, and eight letters of its unique id.

    A retry of the same flow run has the same name, and so finds its worktree again.
    """
    words = re.sub(r"[^a-z0-9]+", "-", str(runtime.flow_run.name).lower()).strip("-")[:60]
    return worktree.check_run_name(f"{words or 'run'}-{str(runtime.flow_run.id)[:8]}")


def commit_results(repo: Path, root: Path, run: str, what: str = "results") -> None:
    """Commit dvc.lock and metrics on the run's branch, where `dvc repro` then has nothing to do; remove old worktrees afterwards."""
    git.run_git(root, "add", "--update")
    commit = git.commit_paths(root, ["dvc.lock", "metrics"], f"run {run}: {what}")
    logger = get_run_logger()
    logger.info(f"{root} is branch run/{run} at {commit[:12]}; `cf runs open {run} DIR` opens it elsewhere, and `dvc repro` repeats it")
    for folder in worktree.prune_worktrees(repo, line=logger.warning):
        logger.info(f"removed the worktree {folder}; its branch stays")


def discard_worktree(repo: Path, root: Path) -> None:
    """Remove the worktree and the branch of a run that made nothing."""
    git.run_git(repo, "worktree", "remove", "--force", str(root))
    git.run_git(repo, "branch", "--quiet", "-D", f"run/{root.name}")


def deliver_logs() -> None:
    """Wait until the server has every line logged so far. Prefect sends them from a thread, and drops them when the process ends.

    MEASURED: server killed in the middle of a stage of 12 s and back 22 s later: without this, not one of its 120 lines arrived.
    """
    # in a thread: where there is an event loop, Prefect would hand back a coroutine instead of waiting
    waiting = threading.Thread(target=APILogWorker.drain_all, kwargs={"timeout": LOG_PATIENCE}, daemon=True)
    waiting.start()
    waiting.join(LOG_PATIENCE)
