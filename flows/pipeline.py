"""dvc.yaml as one Prefect flow, with or without a server. It knows the stages by name and nothing of what they do.

Without options it runs in this checkout, as `dvc repro` would, and ends with the same dvc.lock. Another profile or other values get
a git worktree of their own (flows/project/worktree.py), as every run of a deployment does: nobody's files are touched.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect import allow_failure, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Failed
from prefect.utilities.annotations import quote
from pydantic import ValidationError

from flows import exchange
from flows.machine import reconcile
from flows.project import dvc_graph, dvc_lock, git, run_lock, worktree
from flows.project.dvc_graph import Stage
from flows.run import artifacts, logs
from flows.run.config import RunConfig, parse
from flows.run.frame import tidy
from flows.run.stage_task import DONE, Run, environment, one
from flows.supervise import command

AS_COMMITTED = RunConfig()
Result = TypeVar("Result")
AGAIN_AFTER = 2.0  # seconds before a stage's retry
EXAMPLES = """examples:
  python -m flows.pipeline                                  what `dvc repro` would do, here
  python -m flows.pipeline --dry-run                        only say what would run
  python -m flows.pipeline --from stage2                    stage2 and what follows from it
  python -m flows.pipeline --to encode --at-once 1          what leads to encode, one after another
  python -m flows.pipeline --stages evaluate report         only these two
  python -m flows.pipeline --profile smoke --set stage2.steps=4 --set stage2.teacher.context=none
                                                            in a worktree of its own, .runs/<name>, on branch run/<name>"""


@flow(name="pipeline", on_crashed=[reconcile.close_tasks], on_cancellation=[reconcile.close_tasks])
def pipeline(config: RunConfig = AS_COMMITTED) -> dict[str, str] | State[Any]:
    """The stages of dvc.yaml, with the parameters asked for. What happened to each; a failure if one failed."""
    return framed(lambda: _whole(config))


def framed(whole: Callable[[], Result]) -> Result | State[Any]:
    """What every flow begins and ends with."""
    command.start()
    try:
        tidy(Path.cwd())
        return whole()
    except (RuntimeError, ValueError) as error:
        get_run_logger().error(str(error))
        return Failed(message=str(error))  # the sentence itself: what an exception would say of itself goes before it
    finally:
        command.stop()
        logs.deliver()


def _whole(config: RunConfig) -> dict[str, str]:
    repo = Path.cwd().resolve()
    if not (repo / "dvc.yaml").is_file():
        raise ValueError(f"{repo} has no dvc.yaml; run this at the root of the project")
    apart = runtime.deployment.id is not None or config.overrides or config.profile != "params.yaml"
    run = name() if apart else str(runtime.flow_run.name)
    root = worktree.make(repo, run, profile=config.profile, overrides=config.changes()) if apart else repo
    with run_lock.alone(root, str(runtime.flow_run.id)):
        check(root)
        chosen = dvc_graph.selected(dvc_graph.stages(root), config.stages, config.from_stage, config.to_stage)
        if config.dry_run:
            planned = plan(root, chosen)
            if apart:
                git.git(repo, "worktree", "remove", "--force", str(root))
                git.git(repo, "branch", "--quiet", "-D", f"run/{run}")
            return planned
        pull = config.pull and exchange.there(root)
        failed: RuntimeError | None = None
        try:
            states = repro(root, only=[stage.name for stage in chosen], pull=pull, run=run, at_once=config.at_once, repo=repo)
        except RuntimeError as error:
            failed = error
        if apart:
            keep(repo, root, run)
        elif failed:
            dvc_graph.bring_back(root)
        if config.push and not command.stopping():
            exchange.give(root, failed)
        if failed:
            raise failed
        return states


def name() -> str:
    """Of this run, its folder and its branch: the flow run's, which is what the UI shows, and enough of its id to be the only one.
    A retry of the same flow run has the same."""
    words = re.sub(r"[^a-z0-9]+", "-", str(runtime.flow_run.name).lower()).strip("-")[:60]
    return worktree.checked(f"{words or 'run'}-{str(runtime.flow_run.id)[:8]}")


@task(name="check parameters", task_run_name="check parameters", cache_policy=NO_CACHE)
def check(root: Path) -> None:
    """`cf validate` before anything runs; its sentence is the failure. A project without it has nothing to check."""
    if not (root / "tasks/validate.py").exists():
        return
    logger, said = get_run_logger(), list[str]()

    def line(text: str) -> None:
        if text.strip():
            said.append(text.strip())
            logger.info(said[-1])

    with tempfile.TemporaryDirectory() as folder:  # not where the stage of that name writes
        words = [sys.executable, "-m", "tasks", "validate", "--out", f"{folder}/params.json"]
        code = command.run(words, cwd=root, env=environment("validate", root, root), line=line, timeout=300)
    if code:
        raise ValueError(said[-1].removeprefix("cf validate: ") if said else f"`cf validate` ended with {code} and said nothing")


def repro(
    root: Path, *, only: list[str] | None = None, pull: bool = False, run: str, at_once: int = 4, repo: Path | None = None
) -> dict[str, str]:
    """The stages as tasks of the current flow, each as soon as what it needs is there. RuntimeError when one failed."""
    logger = get_run_logger()
    known = dvc_graph.stages(root)
    chosen = dvc_graph.selected(known, only or ())
    shared = Run(root, environment(run, root, repo or root), _unchanged(root), threading.Semaphore(at_once), pull)
    before, futures = dvc_lock.recorded(git.committed(root, "dvc.lock")), dict[str, Any]()
    for stage in chosen:
        waits = _waits(stage, known, {stage.name for stage in chosen})
        options: dict[str, Any] = {"name": stage.name, "task_run_name": stage.name, "description": stage.desc, "retries": stage.retries}
        running: Any = one.with_options(**options, retry_delay_seconds=AGAIN_AFTER, tags=["gpu"] if stage.gpus else [])
        futures[stage.name] = running.submit(
            stage.name, quote(stage), quote(waits), quote(shared), wait_for=[allow_failure(futures[other]) for other in waits]
        )
    try:
        for future in futures.values():
            future.wait()
    except BaseException:  # SIGTERM is an exception of Prefect's here
        command.stop()
        raise
    dvc_lock.put_in_order(root, before, known)
    states = {stage.name: shared.outcome.get(stage.name, "Failed") for stage in chosen}
    artifacts.results(root, run, states, logger.warning)
    failed = [stage for stage, state in states.items() if state == "Failed"]
    if failed:
        skipped = [stage for stage, state in states.items() if state == "Skipped"]
        said = [text for text in shared.said.get(failed[0], []) if not text.startswith("ERROR: failed to reproduce")]
        rest = f"; skipped: {', '.join(skipped)}" if skipped else ""
        raise RuntimeError(f"{', '.join(failed)} failed: {said[-1] if said else 'it said nothing'}{rest}")
    return states


def plan(root: Path, chosen: list[Stage]) -> dict[str, str]:
    """What would happen, as far as can be known before: a stage that makes the same again lets those after it rest."""
    clean, states, rows = _unchanged(root), dict[str, str](), list[dict[str, str]]()
    for stage in chosen:
        after = [other for other in stage.upstream if states.get(other, "Cached") != "Cached"]
        states[stage.name] = "Cached" if stage.name in clean and not after else "Would run"
        why = "nothing changed" if states[stage.name] == "Cached" else f"after {', '.join(after)}" if after else "it changed"
        rows.append({"stage": stage.name, "state": states[stage.name], "why": why})
        get_run_logger().info(f"{stage.name}: {states[stage.name]}, {why}")
    artifacts.table(rows, "dry-run", "what would run", get_run_logger().warning)
    return states


def _waits(stage: Stage, known: list[Stage], chosen: set[str]) -> tuple[str, ...]:
    """The nearest stages before it that are part of this run, looking through those that are not."""
    by_name = {other.name: other for other in known}
    found: dict[str, None] = {}
    for other in stage.upstream:
        found |= {other: None} if other in chosen else dict.fromkeys(_waits(by_name[other], known, chosen))
    return tuple(found)


def _unchanged(root: Path) -> set[str]:
    """Saves a second a stage; when it can't be known, each stage finds out for itself."""
    try:
        return dvc_graph.unchanged(root)
    except RuntimeError as error:
        get_run_logger().warning(str(error))
        return set()


def keep(repo: Path, root: Path, run: str, what: str = "results") -> None:
    """dvc.lock and metrics on the run's branch: at that commit `dvc repro` has nothing to do. Then old folders go."""
    git.git(root, "add", "--update")
    found = git.commit(root, ["dvc.lock", "metrics"], f"run {run}: {what}")
    logger = get_run_logger()
    logger.info(f"{root} is branch run/{run} at {found[:12]}; `dvc repro` at that commit repeats it")
    for folder in worktree.prune(repo, line=logger.warning):
        logger.info(f"removed the worktree {folder}; its branch stays")


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m flows.pipeline", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    fields = RunConfig.model_fields
    parser.add_argument("--profile", default="params.yaml", help=fields["profile"].description)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=fields["overrides"].description)
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help=fields["stages"].description)
    parser.add_argument("--from", dest="from_stage", metavar="STAGE", help=fields["from_stage"].description)
    parser.add_argument("--to", dest="to_stage", metavar="STAGE", help=fields["to_stage"].description)
    parser.add_argument("--at-once", type=int, default=fields["at_once"].default, metavar="N", help=fields["at_once"].description)
    parser.add_argument("--dry-run", action="store_true", help=fields["dry_run"].description)
    parser.add_argument("--pull", action="store_true", help=fields["pull"].description)
    parser.add_argument("--push", action="store_true", help=fields["push"].description)
    asked = parser.parse_args(argv)
    command.mark()
    try:
        parse(asked.overrides)  # whose sentences are better than the form's patterns
        state = pipeline(RunConfig(**vars(asked)), return_state=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = "is no stage's name" if first["type"] == "string_pattern_mismatch" else first["msg"].removeprefix("Value error, ")
        sys.exit(f"{where} is {first['input']!r}: {said}")
    except ValueError as error:
        sys.exit(str(error))
    if not state.is_completed():
        sys.exit(f"pipeline: {(state.message or str(state.name)).splitlines()[0]}")
    states = cast(dict[str, str], state.result())
    ran = [stage for stage, what in states.items() if what not in ("Cached", "Restored")]
    if asked.dry_run:
        print(f"{len(states)} stages; would run: {', '.join(ran) or 'none'}")
    else:
        print(f"{len(states)} stages, {len([1 for what in states.values() if what in DONE])} done; ran: {', '.join(ran) or 'none'}")


if __name__ == "__main__":
    main(sys.argv[1:])
