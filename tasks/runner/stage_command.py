"""`cf STAGE`: the options of a stage, and its run in one process or in several ranks."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.params.project import Project

from . import ranks
from .execute import WORK, execute
from .process import BEGAN


def run_stage(stage: str, argv: list[str], project: Project) -> None:
    """Run a stage. With several ranks this process only starts them, after it has validated options and parameters."""
    run = importlib.import_module(f"tasks.{stage}").run
    paths = vars(build_parser(stage, run, project).parse_args(argv))
    del paths["params"]  # which `project` has read
    rank, params = ranks.get_rank(), project.params
    if rank is None and (count := ranks.count_ranks(stage, project.tree)) * ranks.count_nodes() > 1:
        sys.exit(ranks.launch_ranks(stage, count))
    store = None if rank is None else ranks.join_ranks()
    if rank and store:
        ranks.run_follower(stage, run, paths, params, store)
        return
    if stage in ranks.TRAINING_STAGES:
        from tasks.commands.plan import refuse_unfit_stage  # here, because other stages need none of its imports

        refuse_unfit_stage(params, stage, paths["out"], WORK / stage)
    announce = None if store is None else lambda work: store.set("work", str(work))
    execute(stage, run, paths, project, began=BEGAN, announce=announce)


def build_parser(stage: str, run: Callable[..., Any], project: Project) -> argparse.ArgumentParser:
    """Build a parser with an option for each keyword-only parameter of `run`: a path, required unless the parameter has a default."""
    entry = project.stages.get(stage)
    epilog = f"in dvc.yaml:\n  {' '.join(entry['cmd'].split())}" if entry else None
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"cf {stage}", description=inspect.getdoc(run), epilog=epilog, formatter_class=form)
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        text = default and f"default: {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=required, default=default, help=text)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    return parser
