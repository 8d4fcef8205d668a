"""One stage of dvc.yaml as a Prefect task: DVC in a process of its own, and the state that DVC's output means."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Cancelled, Completed, Failed

from flows.project.dvc_command import dvc_words, explain_failure
from flows.project.dvc_graph import Stage
from flows.run import artifacts
from flows.supervise import command, gpus
from tasks.files.dvc_rwlock import mend_rwlock

TAIL_LINES = 20  # lines of output that a failure carries
DONE = ("Cached", "Restored", "Completed")
CHATTER = re.compile(  # how lines of DVC's begin that a run's log leaves out
    "To track the changes with git|\tgit add|To enable auto staging|\tdvc config core.autostage|Use `dvc push`|Updating lock file|"
    "Generating lock file|Data and pipelines are up to date"
)


@dataclass
class SharedRun:
    """What the stages of one run share. Each stage writes its own outcome and reason, before the stages that wait for it begin."""

    root: Path
    environment: Mapping[str, str]
    unchanged: set[str]  # stages that one `dvc status` calls unchanged: nothing to do unless a stage before them ran
    slots: threading.Semaphore
    pull: bool = False
    done: Mapping[str, str] = field(default_factory=dict)  # states of stages that ran before the tasks began
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why a stage failed, in one line


class AnyEnd(PrefectConcurrentFuture[Any]):
    """A stage's future for the stages that wait for it, which begin however it ended, because each finds out itself whether it can run.

    Prefect's allow_failure lets a task begin after one that failed, and never after one that is Skipped or Cancelled.
    """

    @property
    def state(self) -> State[Any]:
        return Completed(data=True)


def may_retry(task: object, run: object, state: State[Any]) -> bool:
    """Say whether a failed stage is tried again: not while the run is being stopped, and not after a refusal, which is exit code 2."""
    return not command.stopping.is_set() and not re.search(r"exited with 2(?!\d)", state.message or "")


@task(cache_policy=NO_CACHE, retry_condition_fn=may_retry)
def run_stage(stage: Stage, upstream: tuple[str, ...], run: SharedRun) -> State[None]:
    """Run a stage by `dvc repro --single-item`, unless a stage of `upstream` failed, nothing has changed or the run is stopped.

    A stage that fails or takes longer than its timeout is Failed with its last lines of output; if it is to be tried again, that is
    raised as RuntimeError, because Prefect tries nothing again that returns a state.
    """
    logger, name = get_run_logger(), stage.name
    if name in run.done:
        run.outcomes[name] = run.done[name]
        return Completed(name=run.done[name])
    if missing := [other for other in upstream if run.outcomes.get(other) not in DONE]:
        run.outcomes[name] = "Skipped"
        return Cancelled(name="Skipped", message=f"{', '.join(missing)} did not complete")
    if command.stopping.is_set():
        run.outcomes[name] = "Skipped"
        return Cancelled(name="Skipped", message="the run was stopped before this stage began")
    if name in run.unchanged and all(run.outcomes[other] == "Cached" for other in upstream):
        logger.info(f"{name} is as it was, by `dvc status`")
        run.outcomes[name] = "Cached"
        return Completed(name="Cached")
    run.outcomes[name] = "Failed"  # until the end of this function, which an exception does not reach
    lines: list[str] = []
    progress = artifacts.ProgressBar(name, logger.warning)
    state = "Failed"

    def log(line: str) -> None:
        if line.strip() and not CHATTER.match(line):
            lines.append(line.rstrip())
            logger.info(lines[-1])
            progress.read_line(lines[-1])

    try:
        with _hold_slot(run.slots):
            code = repro_stage(stage, run, log, pull=run.pull)
            if code and run.pull and not any(line.startswith(f"Running stage '{name}'") for line in lines):
                log(f"{name} could not be taken from the remote, so it is made here")
                code = repro_stage(stage, run, log, pull=False)
        if code:
            run.reasons[name] = explain_failure(lines)
            return _fail_stage(stage, [f"{name} failed", *lines[-TAIL_LINES:]])
        state = read_outcome(name, lines)
    except TimeoutError as error:
        run.reasons[name] = f"{name} {error}"
        return _fail_stage(stage, [f"{name} {error}; meta.cf.timeout in dvc.yaml states it", *lines[-TAIL_LINES:]])
    except (command.Stopped, InterruptedError) as error:
        run.outcomes[name] = "Cancelled"
        return Cancelled(message=str(error))
    except ValueError as error:  # of the GPUs that it asks for
        run.reasons[name] = str(error)
        return Failed(message=str(error))
    finally:
        progress.close(state == "Completed")
    run.outcomes[name] = state
    return Completed(name=state)


def _fail_stage(stage: Stage, lines: list[str]) -> State[None]:
    """Return a failed state, which Prefect logs without a traceback, or raise RuntimeError while there are attempts left."""
    failed: State[None] = Failed(message="\n".join(lines))
    if runtime.task_run.run_count <= stage.retries and may_retry(None, None, failed):
        raise RuntimeError(failed.message)
    return failed


def repro_stage(stage: Stage, run: SharedRun, log: Callable[[str], None], *, pull: bool) -> int:
    """Run DVC on this stage alone; return its exit code. DVC waits for its lock, else results of parallel stages would be lost."""
    if mended := mend_rwlock(run.root):
        log(mended)
    words = dvc_words("repro", *(["--pull"] if pull else []), "--single-item", stage.name)
    return command.run(words, cwd=run.root, env=run.environment, line=log, gpus=count_gpus(stage, log), timeout=stage.timeout)


def read_outcome(stage: str, lines: list[str]) -> str:
    """Return the state that DVC's lines mean. DVC names the stage before the stage itself can print anything."""
    state = "Completed"
    for line in lines:
        if line.startswith(f"Running stage '{stage}'"):
            return "Completed"
        if line.startswith("Pulling data for stage:"):  # the outs that dvc.lock names, from the remote
            state = "Restored"
        if line in (f"Stage '{stage}' didn't change, skipping", f"'{stage}' didn't change, skipping"):
            return "Cached"
        if line.startswith(f"Stage '{stage}' is cached - skipping run"):
            return "Restored"
    return state


@contextmanager
def _hold_slot(slots: threading.Semaphore) -> Iterator[None]:
    """Hold one of the places for stages that run at the same time; waiting for a place ends when the run is stopped."""
    while not slots.acquire(timeout=0.5):
        if command.stopping.is_set():
            raise command.Stopped("stopped while waiting for its turn")
    try:
        yield
    finally:
        slots.release()


def count_gpus(stage: Stage, log: Callable[[str], None]) -> int:
    """Return how many GPUs a stage locks.

    Choice: a machine without any GPU runs every stage on its CPU, as `make repro` does; `cf plan` and the stages themselves refuse
    what such a machine can't do. A machine that has GPUs, and fewer than a stage asks for, is refused when the locks are taken.
    """
    available = len(gpus.list_gpus())
    if stage.gpus == "all" or not available:
        if not available and stage.gpus:
            log(f"{stage.name} states gpus: {stage.gpus}; this machine has none, so it runs on the CPU")
        return available
    return int(stage.gpus)
