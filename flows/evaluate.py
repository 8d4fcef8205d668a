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
from flows.run.config import Overrides, Profile, StageName, parse_overrides
from flows.run.frame import commit_results, name_run, run_framed
from flows.run.repro import check_parameters, repro_stages
from tasks.params.yaml_file import read_yaml

# letters that git takes in a tag and a folder's name has: no option, no shell
PLACE_PATTERN = r"^[A-Za-z0-9_./~][A-Za-z0-9_./@#~+-]{0,300}$"


class Checkpoint(BaseModel, extra="forbid"):
    """Which checkpoint, and what is measured."""

    checkpoint: Annotated[str, StringConstraints(pattern=PLACE_PATTERN)] = Field(
        description="A folder of the worker's machine, such as models/stage2 elsewhere, or a version, tag or commit: student@v0.0.1."
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
        check_parameters(root)
        graph = dvc_graph.read_graph(root)
        measured = dvc_graph.select_stages(graph, config.measured)
        states = repro_stages(root, graph, stages_before(graph, measured, config.stage), run=run, repo=repo)
        place_checkpoint(repo, root, config.checkpoint, config.stage, [stage.name for stage in measured])
        states |= repro_stages(root, graph, measured, run=run, repo=repo)
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


@task(name="put the checkpoint in its place", task_run_name="put the checkpoint in its place", cache_policy=NO_CACHE)
def place_checkpoint(repo: Path, root: Path, checkpoint: str, stage: str, measured: list[str]) -> None:
    """Put the checkpoint's files where the stage writes its model, record them in dvc.lock as its outs, and freeze the stage."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    out = find_model_folder(stages, stage)
    place = root / out
    commit = fetch_checkpoint(repo, checkpoint, out, place)
    for dep in {dep for name in measured for dep in stages.get(name, {}).get("deps", []) if Path(dep).is_relative_to(out)}:
        if not (root / dep).exists():
            raise ValueError(f"{checkpoint} has no {Path(dep).relative_to(out)}, which {', '.join(measured)} read; measure fewer stages")
    # the stage's metrics are of another training: they are replaced by the checkpoint's own, or by none
    for file in _out_paths(stages[stage], "metrics"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text((commit and git.read_committed(repo, commit, file)) or "{}\n")
    dvc_graph.freeze_stages(root, [stage])
    run_dvc(root, "commit", "--force", "--no-relink", stage)
    sizes = [file.stat().st_size for file in place.rglob("*") if file.is_file()]
    get_run_logger().info(f"{out} is {checkpoint}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


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


def fetch_checkpoint(repo: Path, checkpoint: str, out: str, place: Path) -> str | None:
    """Replace `place` by a copy of a folder, or by what a commit's dvc.lock names, from cache or remote; return that commit, or None.

    Raises ValueError for a folder that is empty or holds links, and for a word that is neither a folder nor a commit.
    """
    folder = repo / Path(checkpoint).expanduser()
    if folder.is_dir():
        files = list(folder.rglob("*"))
        if odd := next((file for file in files if file.is_symlink() or not (file.is_file() or file.is_dir())), None):
            raise ValueError(f"{odd} is a link or no plain file; a checkpoint is a folder of plain files")
        if not any(file.is_file() for file in files):
            raise ValueError(f"{folder} is empty; name the folder that holds the model's files, such as models/stage2")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        return None
    try:
        commit = git.resolve_commit(repo, checkpoint)
    except ValueError:
        raise ValueError(f"{checkpoint} is neither a folder in {repo} nor a version, tag or commit; `cf history` lists versions") from None
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    run_dvc(repo, "get", ".", out, "--rev", commit, "--out", str(place))
    return commit
