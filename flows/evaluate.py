"""A given checkpoint, measured: a flow that puts it in the place of a stage's model and makes the videos, the numbers and the report.

The flow works in a worktree of its own, on whose branch the stage is frozen and dvc.lock names the checkpoint. So `dvc repro` at that
commit repeats the run, and the model is never mistaken for one that the stage made.
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import BaseModel, Field, StringConstraints

from flows.machine import reconcile
from flows.project import dvc_graph, git, run_lock, worktree
from flows.project.dvc_command import run_dvc
from flows.project.dvc_graph import Stage
from flows.project.dvc_lock import find_out
from flows.run.config import Overrides, Profile, StageName, describe_parameters, parse_overrides
from flows.run.frame import commit_results, name_run, run_framed
from flows.run.repro import ask_project, check_parameters, read_checked_graph, repro_stages
from tasks.files.atomic import delete_path
from tasks.files.words import count_things
from tasks.params.yaml_file import read_yaml

# letters that git takes in a tag and a folder's name has: no option, no shell
PLACE_PATTERN = r"^[A-Za-z0-9_./~][A-Za-z0-9_./@#~+-]{0,300}$"


class Checkpoint(BaseModel, extra="forbid"):
    """Which checkpoint, and what is measured."""

    checkpoint: Annotated[str, StringConstraints(pattern=PLACE_PATTERN)] = Field(
        description="A folder of the worker's machine, such as models/stage2 elsewhere, or a version, tag or commit: `student@v0.0.1`."
    )
    stage: StageName = Field("stage2", description="The stage whose model it takes the place of.")
    measured: list[StageName] = Field(
        ["generate", "evaluate", "report"], min_length=1, max_length=20, description="The stages that run with it."
    )
    profile: Profile = Field("params.yaml", description="The parameters to start from.")
    overrides: Overrides = Field(default_factory=list, description="Values laid over them, for example generate.prompts=8.")


@flow(name="evaluate", on_crashed=[reconcile.close_tasks], on_cancellation=[reconcile.close_tasks])
def evaluate(config: Checkpoint) -> dict[str, str] | State[Any]:
    """The checkpoint's videos and numbers, beside those of the other systems, which come from the cache where they are there."""
    return run_framed(lambda: _measure_checkpoint(config))


def _measure_checkpoint(config: Checkpoint) -> dict[str, str]:
    """Return the state of each stage. Raises ValueError for a checkpoint or stages that don't fit, RuntimeError when a stage failed."""
    repo, run = Path.cwd().resolve(), name_run()
    root = worktree.make_worktree(repo, run, profile=config.profile, overrides=parse_overrides(config.overrides))
    with run_lock.hold_checkout(root, str(runtime.flow_run.id)):
        # All that can be wrong about the checkpoint is found here, before a training that the measured stages may need.
        check_parameters(root)
        graph = read_checked_graph(root)
        measured = dvc_graph.select_stages(graph, config.measured)
        before = stages_before(graph, measured, config.stage)
        commit = fetch_checkpoint(repo, root, config.checkpoint, config.stage, [stage.name for stage in measured])
        states = repro_stages(root, graph, before, run=run, repo=repo)
        record_checkpoint(repo, root, config.checkpoint, config.stage, commit)
        about = f"`{config.checkpoint}` as the model of {config.stage}. {describe_parameters(config.profile, config.overrides)}"
        states |= repro_stages(root, graph, measured, run=run, repo=repo, about=about)
        commit_results(repo, root, run, f"{config.checkpoint} as {config.stage}, measured")
        get_run_logger().info(f"its report is {root}/reports/report.html")
        return states


def stages_before(graph: list[Stage], measured: list[Stage], replaced: str) -> list[Stage]:
    """Return the stages that the measured ones need, in running order, without the stage whose model is replaced.

    Raises ValueError if one of them is made from the replaced model, because what it made would be of another model.
    """
    names = {stage.name for last in measured for stage in dvc_graph.select_stages(graph, (), None, last.name)}
    names -= {replaced, *(stage.name for stage in measured)}
    if wrong := [stage.name for stage in dvc_graph.select_stages(graph, (), replaced) if stage.name in names]:
        way = f"add {', '.join(wrong)} to what is measured, or name {wrong[-1]} as the stage"
        raise ValueError(f"{wrong[0]} is made from {replaced}; {way}")
    return [stage for stage in graph if stage.name in names]


def fetch_checkpoint(repo: Path, root: Path, checkpoint: str, stage: str, measured: list[str]) -> str | None:
    """Put the checkpoint's files where the stage writes its model; return the commit that they come from, or None for a folder.

    Raises ValueError for a word that is neither a folder nor a commit, and for files that are no model of that stage or lack one that
    the measured stages read. A folder is checked where it lies, before anything of it is copied.
    """
    stages = read_yaml(root / "dvc.yaml")["stages"]
    out = find_model_folder(stages, stage)
    place, folder = root / out, repo / Path(checkpoint).expanduser()
    deps = {dep for name in measured for dep in stages.get(name, {}).get("deps", []) if Path(dep).is_relative_to(out)}
    needed = [str(Path(dep).relative_to(out)) for dep in sorted(deps) if dep != out]
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise ValueError(f"{folder} is empty; name the folder that holds the model's files, such as models/stage2")
        _refuse_other_folder(root, folder, stage, needed, measured)
        if odd := next((file for file in folder.rglob("*") if file.is_symlink() or not (file.is_file() or file.is_dir())), None):
            raise ValueError(f"{odd} is a link or no plain file; a checkpoint is a folder of plain files")
        delete_path(place)
        shutil.copytree(folder, place)
        return None
    try:
        commit = git.resolve_commit(repo, checkpoint)
    except ValueError:
        raise ValueError(f"{checkpoint} is neither a folder in {repo} nor a version, tag or commit; `cf history` lists versions") from None
    find_out(repo, commit, out)
    delete_path(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    run_dvc(repo, "get", ".", out, "--rev", commit, "--out", str(place))
    _refuse_other_folder(root, place, stage, needed, measured)
    return commit


def _refuse_other_folder(root: Path, folder: Path, stage: str, needed: list[str], measured: list[str]) -> None:
    """Raise ValueError for a folder that lacks a file which the measured stages read, or is no whole model that fits params.yaml."""
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise ValueError(f"{folder} has no {missing[0]}, which {', '.join(measured)} read; measure fewer stages, or name another folder")
    if (root / "tasks/commands/check_model.py").exists():
        ask_project(root, "check-model", str(folder), "--stage", stage)


@task(name="put the checkpoint in its place", task_run_name="put the checkpoint in its place", cache_policy=NO_CACHE)
def record_checkpoint(repo: Path, root: Path, checkpoint: str, stage: str, commit: str | None) -> None:
    """Record the fetched files in dvc.lock as the stage's outs, and freeze the stage."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    out = find_model_folder(stages, stage)
    # the stage's metrics are of another training: they are replaced by the checkpoint's own, or by none
    for file in _out_paths(stages[stage], "metrics"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text((commit and git.read_committed(repo, commit, file)) or "{}\n")
    dvc_graph.freeze_stages(root, [stage])
    run_dvc(root, "commit", "--force", "--no-relink", stage)
    sizes = [file.stat().st_size for file in (root / out).rglob("*") if file.is_file()]
    get_run_logger().info(f"{out} is {checkpoint}: {count_things(len(sizes), 'file')}, {sum(sizes) / 2**20:.1f} MiB")


def _out_paths(stage: dict[str, Any], kind: str) -> list[str]:
    """Return the paths under `outs` or `metrics`, each of which may be a mapping with options."""
    return [out if isinstance(out, str) else next(iter(out)) for out in stage.get(kind, [])]


def find_model_folder(stages: dict[str, Any], stage: str) -> str:
    """Return the one folder in models/ that a stage makes. Raises ValueError for a stage that is absent or makes no single model."""
    if stage not in stages:
        raise ValueError(f"{stage} is no stage; known are {', '.join(stages)}")
    names = _out_paths(stages[stage], "outs")
    models = [out for out in names if Path(out).parts[0] == "models"]
    if len(models) != 1:
        raise ValueError(f"{stage} makes {', '.join(names) or 'nothing'}, and no single folder in models/; name a stage that makes a model")
    return models[0]
