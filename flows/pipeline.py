"""dvc.yaml as one Prefect flow, with or without a server. The flow knows the stages by name and nothing of what they compute.

Without options the flow runs in this checkout, as `dvc repro` would, and ends with the same dvc.lock. Another profile or other values
get a git worktree of their own (flows/project/worktree.py), as every run of a deployment does, so no file of the checkout changes.
"""

import sys
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from pydantic import ValidationError

from flows.machine import reconcile
from flows.project import dvc_graph, run_lock, worktree
from flows.project.dvc_command import run_dvc
from flows.run.config import RunConfig, describe_parameters, parse_overrides
from flows.run.frame import commit_results, discard_worktree, name_run, run_framed, say_failures_once
from flows.run.repro import VALIDATE, check_parameters, plan_stages, push_results, read_checked_graph, remote_answers, repro_stages
from flows.run.stage_task import DONE
from flows.supervise import command
from tasks.files.options import parse_options
from tasks.files.words import count_things

AS_COMMITTED = RunConfig()


@flow(name="pipeline", on_crashed=[reconcile.close_tasks], on_cancellation=[reconcile.close_tasks])
def pipeline(config: RunConfig = AS_COMMITTED) -> dict[str, str] | State[Any]:
    """Run the stages of dvc.yaml with the parameters asked for; return the state of each, or a failure if one failed."""
    return run_framed(lambda: _run_pipeline(config))


def _run_pipeline(config: RunConfig) -> dict[str, str]:
    """Return the state of each chosen stage. Raises ValueError for a refusal, RuntimeError when a stage or the push failed."""
    repo = Path.cwd().resolve()
    if not (repo / "dvc.yaml").is_file():
        raise ValueError(f"{repo} has no dvc.yaml; run this at the root of the project")
    # 1. Where: in this checkout, or in a worktree with the parameters committed.
    apart = runtime.deployment.id is not None or config.overrides or config.profile != "params.yaml"
    run = name_run() if apart else str(runtime.flow_run.name)
    root = worktree.make_worktree(repo, run, profile=config.profile, overrides=parse_overrides(config.overrides)) if apart else repo
    with run_lock.hold_checkout(root, str(runtime.flow_run.id)):
        # 2. What: DVC's graph is built here, once, and handed on. Parameters that passed are not checked again.
        graph = read_checked_graph(root)
        chosen = config.select(graph)
        unchanged = dvc_graph.find_unchanged(root, graph, get_run_logger().warning)
        may_run = VALIDATE in {stage.name for stage in chosen} and not config.dry_run
        as_stage: dict[str, Any] = {"run": run, "repo": repo} if may_run else {}
        checked = {} if VALIDATE in unchanged else check_parameters(root, **as_stage)
        if config.dry_run:
            planned = plan_stages(chosen, unchanged)
            if apart:
                discard_worktree(repo, root)
            return planned
        # 3. The stages. What has finished is committed and pushed before a failure ends the run.
        pull, failure = config.pull and remote_answers(root), None
        try:
            about = describe_parameters(config.profile, config.overrides)
            known: dict[str, Any] = {"unchanged": unchanged, "done": checked, "about": about}
            states = repro_stages(root, graph, chosen, run=run, repo=repo, pull=pull, at_once=config.at_once, **known)
        except RuntimeError as error:
            failure = error
        if apart:
            commit_results(repo, root, run)
        elif failure:
            try:  # DVC removes a stage's outs before it runs the stage: the last good ones come back from the cache
                run_dvc(root, "checkout")
            except RuntimeError as error:
                get_run_logger().warning(f"not all results from before could be brought back: {error}")
        if config.push and not command.stopping.is_set():
            push_results(root, failure)
        if failure:
            raise failure
        return states


def find_idle_stages(repo: Path, config: RunConfig) -> list[str]:
    """Return the names of the chosen stages if none of them has anything to do and no server is there to be told; else nothing.

    So a run without anything to do does not start Prefect's temporary server, which takes far longer than the question.
    """
    apart = config.profile != AS_COMMITTED.profile or config.overrides
    if apart or config.push or get_current_settings().api.url or not (repo / "dvc.yaml").is_file() or run_lock.find_dead_run(repo):
        return []
    try:
        with run_lock.hold_checkout(repo):
            graph = dvc_graph.read_graph(repo)
            names = [stage.name for stage in config.select(graph)]
            unchanged = dvc_graph.find_unchanged(repo, graph)
    except (ValueError, RuntimeError):
        return []  # the flow says it
    checked = VALIDATE in unchanged or not (repo / "tasks/validate.py").exists()
    return names if checked and unchanged.issuperset(names) else []


def main(argv: list[str]) -> None:
    """Run the flow with the options of the command line; exit with one sentence when it refuses or fails."""
    helps = {name: field.description for name, field in RunConfig.model_fields.items()}  # the table has none: those of the form
    args = parse_options("pipeline", argv, __doc__, helps)
    try:
        parse_overrides(args.overrides or [])  # its sentences are better than those of the form's patterns
        config = RunConfig(**{name: value for name, value in vars(args).items() if value is not None})
        states = dict.fromkeys(find_idle_stages(Path.cwd(), config), "Cached")
        if not states:
            command.mark_environment()
            say_failures_once()
            state = pipeline(config, return_state=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = "is no stage's name" if first["type"] == "string_pattern_mismatch" else first["msg"].removeprefix("Value error, ")
        sys.exit(f"{where} is {first['input']!r}: {message}")
    except ValueError as error:
        sys.exit(str(error))
    if not states:
        if not state.is_completed():
            sys.exit(f"pipeline: {(state.message or str(state.name)).splitlines()[0]}")
        states = cast(dict[str, str], state.result())
    ran = ", ".join(stage for stage, outcome in states.items() if outcome not in ("Cached", "Restored")) or "none"
    done = sum(outcome in DONE for outcome in states.values())
    stages = count_things(len(states), "stage")
    print(f"{stages}; would run: {ran}" if args.dry_run else f"{stages}, {done} done; ran: {ran}")


if __name__ == "__main__":
    main(sys.argv[1:])
