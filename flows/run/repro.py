"""dvc.yaml's stages under Prefect: parameters checked first, each stage as soon as its inputs exist, results pushed afterwards."""

import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect import get_run_logger
from prefect.utilities.annotations import quote

from flows.project import dvc_graph, dvc_lock, dvc_remote, git
from flows.project.dvc_command import dvc_words, explain_failure
from flows.project.dvc_graph import Stage
from flows.run import artifacts
from flows.run.stage_task import AnyEnd, SharedRun, read_outcome, run_stage
from flows.supervise import command
from flows.supervise.environment import stage_environment
from tasks.params.yaml_file import read_yaml

RETRY_DELAY = 2.0  # seconds before a stage is tried again
STOP_PATIENCE = 20.0  # seconds for all stages to end when the run is stopped; Prefect's worker kills the flow after 30
VALIDATE = "validate"  # both the command and the stage that check params.yaml


def check_parameters(root: Path, *, run: str = "", repo: Path | None = None) -> dict[str, str]:
    """Check params.yaml before any stage, by the project's `cf validate`. Raises ValueError with its sentence.

    With the name of the run and its checkout, by the stage of that name, if the project has it: so it need not run again. Return its
    state then.
    """
    if run and repo and VALIDATE in (read_yaml(root / "dvc.yaml").get("stages") or {}):
        words, environment = dvc_words("repro", "--single-item", VALIDATE), stage_environment(run, root, repo)
        return {VALIDATE: read_outcome(VALIDATE, _run_check(root, VALIDATE, words, environment))}
    if (root / "tasks/validate.py").exists():
        with tempfile.TemporaryDirectory() as folder:  # not the path that the stage writes
            ask_project(root, "validate", "--out", f"{folder}/params.json")
    return {}


def read_checked_graph(root: Path) -> list[Stage]:
    """Read the graph of a project. Where DVC refuses because of a parameter, `cf validate` says so in better words."""
    try:
        return dvc_graph.read_graph(root)
    except ValueError:
        check_parameters(root)
        raise


def ask_project(root: Path, *words: str) -> None:
    """Run a command of the project's `cf` that refuses in one sentence. Raises ValueError with that sentence."""
    environment = stage_environment(words[0], root, root) | {"WANDB_MODE": "disabled"}  # no run in W&B for a question
    _run_check(root, words[0], [sys.executable, "-m", "tasks", *words], environment)


def _run_check(root: Path, name: str, words: list[str], environment: Mapping[str, str]) -> list[str]:
    """Run a command to its end and return its lines. Raises ValueError with the sentence that it ended badly with."""
    code, lines = command.run_logged(words, log=get_run_logger().debug, cwd=root, env=environment, timeout=300)
    if code:
        raise ValueError(explain_failure(lines).removeprefix(f"cf {name}: "))
    return lines


def repro_stages(
    root: Path,
    graph: list[Stage],
    chosen: list[Stage],
    *,
    run: str,
    repo: Path,
    pull: bool = False,
    at_once: int = 4,
    unchanged: set[str] | None = None,
    done: Mapping[str, str] = MappingProxyType({}),
    about: str = "",
) -> dict[str, str]:
    """Run the chosen stages as tasks of the current flow, each as soon as its inputs are ready. Return the state of each stage.

    `graph` has all stages of the project at `root`, in running order; `chosen` is a part of it. `repo` is the checkout that `root` is a
    worktree of, or `root` itself. `unchanged` is what `dvc_graph.find_unchanged` says, if that was asked already, and `done` has the
    states of stages that ran already. `about` says what was asked for. Raises RuntimeError when a stage failed, after all that do not
    need it have ended.
    """
    logger = get_run_logger()
    if unchanged is None:
        unchanged = dvc_graph.find_unchanged(root, graph, logger.warning)
    shared = SharedRun(root, stage_environment(run, root, repo), unchanged, threading.Semaphore(at_once), pull, done)
    committed, futures = dvc_lock.list_recorded(git.read_committed(root, "HEAD", "dvc.lock") or ""), dict[str, Any]()
    for stage in chosen:
        upstream = nearest_upstream(stage, graph, {stage.name for stage in chosen})
        options: dict[str, Any] = {"name": stage.name, "task_run_name": stage.name, "description": stage.desc, "retries": stage.retries}
        ends = [AnyEnd(futures[other].task_run_id, futures[other].wrapped_future) for other in upstream]
        stage_task: Any = run_stage.with_options(**options, retry_delay_seconds=RETRY_DELAY, tags=["gpu"] if stage.gpus else [])
        futures[stage.name] = stage_task.submit(quote(stage), quote(upstream), quote(shared), wait_for=ends)
    try:
        for future in futures.values():
            future.wait()
    except BaseException:  # also SIGTERM, which Prefect raises here as an exception
        command.stop_commands()
        until = time.monotonic() + STOP_PATIENCE
        for future in futures.values():  # else Prefect would call what is ended Failed, and what has not begun Crashed
            future.wait(timeout=max(0.0, until - time.monotonic()))
        raise
    dvc_lock.sort_lock(root, committed, graph)
    states = {stage.name: shared.outcomes.get(stage.name, "Failed") for stage in chosen}
    artifacts.show_results(root, run, states, about, logger.warning)
    if failed := [stage for stage, state in states.items() if state == "Failed"]:
        skipped = ", ".join(stage for stage, state in states.items() if state == "Skipped")
        rest = f"; skipped: {skipped}" if skipped else ""
        raise RuntimeError(f"{', '.join(failed)} failed: {shared.reasons.get(failed[0], 'it said nothing')}{rest}")
    return states


def plan_stages(chosen: list[Stage], unchanged: set[str]) -> dict[str, str]:
    """Return and show which of the chosen stages would run, and why, as far as that is known before.

    A stage that makes the same bytes again lets the stages after it rest, so fewer may run than are said to.
    """
    logger, states, rows = get_run_logger(), dict[str, str](), list[dict[str, str]]()
    for stage in chosen:
        after = [other for other in stage.upstream if states.get(other, "Cached") != "Cached"]
        states[stage.name] = "Cached" if stage.name in unchanged and not after else "Would run"
        why = "nothing changed" if states[stage.name] == "Cached" else f"after {', '.join(after)}" if after else "it changed"
        rows.append({"stage": stage.name, "state": states[stage.name], "why": why})
        logger.info(f"{stage.name}: {states[stage.name]}, {why}")
    artifacts.show_table(rows, "dry-run", "what would run", logger.warning)
    return states


def nearest_upstream(stage: Stage, graph: list[Stage], chosen: set[str]) -> tuple[str, ...]:
    """Return the chosen stages that a stage waits for, looking through the stages between them that are not chosen."""
    by_name = {other.name: other for other in graph}
    nearest: dict[str, None] = {}
    for other in stage.upstream:
        nearest |= {other: None} if other in chosen else dict.fromkeys(nearest_upstream(by_name[other], graph, chosen))
    return tuple(nearest)


def remote_answers(root: Path) -> bool:
    """Say whether results can be pulled. A remote that does not answer is no reason not to run, because all it has can be made here.

    Raises dvc_remote.RemoteMisconfigured for a remote that is set up wrong.
    """
    try:
        get_run_logger().info(f"takes what {dvc_remote.check_remote(root)} has")
    except dvc_remote.RemoteAway as error:
        get_run_logger().warning(f"{error}; everything is made here")
        return False
    return True


def push_results(root: Path, failure: RuntimeError | None) -> None:
    """Push what has finished, also when a stage failed. Raises RuntimeError for a failed push, unless `failure` already ends the run."""
    state = dvc_remote.push_task(root, return_state=True)
    if not state.is_completed() and not failure:
        message = re.sub(r"^Task run encountered an exception \w+: ", "", state.message or "it did not end")
        raise RuntimeError(f"the stages are finished and not sent: {message}; `cf remote push` in {root} sends them")
