"""One stage of dvc.yaml as a Prefect task: DVC in a process of its own, and what it says as a state."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed

from flows.project.dvc_graph import Stage
from flows.run import artifacts
from flows.supervise import command, gpus

LAST = 20  # lines that a failure carries
SECRET = ("PREFECT_", "CF_ALERT_")  # of the environment, and none of a stage's business: there is a password in both
DONE = ("Cached", "Restored", "Completed")
CHATTER = (
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    "Updating lock file",
    "Generating lock file",
    "Data and pipelines are up to date",
)


@dataclass
class Run:
    """What the stages of one run share. `outcome` is written by each stage for itself, before those that wait for it begin."""

    root: Path
    environment: Mapping[str, str]
    clean: set[str]  # by one `dvc status`: nothing to do unless something before them ran
    slots: threading.Semaphore
    pull: bool = False
    outcome: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)


def environment(run: str, root: Path, repo: Path) -> dict[str, str]:
    """Of the stages: this interpreter's `python` and `dvc`, the run's name, and no password of Prefect or the alerts.

    Offline runs of W&B, and what is kept of single clips, go to the checkout that the run's worktree belongs to: they outlive the
    worktree.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(SECRET)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    outlives = {} if root == repo else {"WANDB_DIR": str(repo / "runtime"), "CF_KEPT": str(repo / "work/kept")}
    return {"CF_RUN": run, "AWS_MAX_ATTEMPTS": "3", **outlives, **kept, "PYTHONUNBUFFERED": "1", "PATH": path}


def worth_another(one: object, run: object, state: State[Any]) -> bool:
    """Not when the run is being stopped, and not when the stage refused what it was asked for: `cf` ends with 2 then."""
    return not command.stopping() and not re.search(r"exited with 2(?!\d)", state.message or "")


@task(cache_policy=NO_CACHE, retry_condition_fn=worth_another)
def one(stage: str, what: Stage, waits: tuple[str, ...], run: Run) -> State[None]:
    """`dvc repro --single-item`, unless something it waits for failed, or there is nothing to do."""
    logger = get_run_logger()
    if missing := [name for name in waits if run.outcome.get(name) not in DONE]:
        run.outcome[stage] = "Skipped"
        return Cancelled(name="Skipped", message=f"{', '.join(missing)} did not complete")
    if stage in run.clean and all(run.outcome[name] == "Cached" for name in waits):
        logger.info(f"{stage} is as it was, by `dvc status`")
        run.outcome[stage] = "Cached"
        return Completed(name="Cached")
    run.outcome[stage] = "Failed"  # until it is known better
    said = run.said[stage] = []
    progress = artifacts.Progress(stage, logger.warning)
    state = "Failed"

    def line(text: str) -> None:
        if text.strip() and not text.startswith(CHATTER):
            said.append(text.rstrip())
            logger.info(said[-1])
            progress.line(said[-1])

    try:
        with _slot(run.slots):
            code = repro(stage, what, run, line, pull=run.pull)
            if code and run.pull and not any(text.startswith(f"Running stage '{stage}'") for text in said):
                line(f"{stage} could not be taken from the remote, so it is made here")
                code = repro(stage, what, run, line, pull=False)
        if code:
            raise RuntimeError("\n".join([f"{stage} failed", *said[-LAST:]]))
        state = outcome(stage, said)
    except TimeoutError as error:
        run.said[stage].append(f"{stage} {error}")
        raise RuntimeError("\n".join([f"{stage} {error}; meta.cf.timeout in dvc.yaml states it", *said[-LAST:]])) from None
    finally:
        progress.close(state == "Completed")
    run.outcome[stage] = state
    return Completed(name=state)


def repro(stage: str, what: Stage, run: Run, line: Callable[[str], None], *, pull: bool) -> int:
    """DVC's exit code."""
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *(["--pull"] if pull else []), "--single-item", stage]
    return command.run(words, cwd=run.root, env=run.environment, line=line, gpus=to_lock(what, line), timeout=what.timeout)


def outcome(stage: str, said: list[str]) -> str:
    """By what DVC said before anything of the stage itself could speak."""
    state = "Completed"
    for text in said:
        if text.startswith(f"Running stage '{stage}'"):
            return "Completed"
        if text.startswith("Pulling data for stage:"):  # as dvc.lock names it, from the remote
            state = "Restored"
        if text in (f"Stage '{stage}' didn't change, skipping", f"'{stage}' didn't change, skipping"):
            return "Cached"
        if text.startswith(f"Stage '{stage}' is cached - skipping run"):
            return "Restored"
    return state


class _slot:
    """One of the run's places, given up on when the run is stopped."""

    def __init__(self, slots: threading.Semaphore) -> None:
        self.slots = slots

    def __enter__(self) -> None:
        while not self.slots.acquire(timeout=0.5):
            if command.stopping():
                raise command.Stopped("stopped while waiting for its turn")

    def __exit__(self, *_: object) -> None:
        self.slots.release()


def to_lock(stage: Stage, line: Any) -> int:
    """How many GPUs. Choice: a machine without any runs every stage on its CPU, as `make repro` does; `cf plan` and the stages
    themselves refuse what such a machine can't do. One that has some, and fewer than asked for, is refused."""
    there = len(gpus.available())
    if stage.gpus == "all" or not there:
        if not there and stage.gpus:
            line(f"{stage.name} states gpus: {stage.gpus}; this machine has none, so it runs on the CPU")
        return there
    return int(stage.gpus)
