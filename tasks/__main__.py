"""The `cf` command, also `python -m tasks`: one stage of dvc.yaml by hand, and what goes with them."""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import inspect
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tasks.params import yaml_file
from tasks.params.yaml_file import Refused

BEGAN = time.time()
PIPELINE = Path("dvc.yaml")
COMMANDS = {  # command -> file whose `main` (or the function after the colon) runs it, and what it does
    "profile": ("tasks.commands.profile", "list | use NAME: the complete parameter files in profiles/"),
    "preset": ("tasks.commands.preset", "list | use NAME: published methods in presets/, laid over params.yaml"),
    "plan": ("tasks.commands.plan.table", "[--gpus 8 --gpu-memory 80]: memory, operations, hours and disk of every training stage"),
    "import-weights": ("tasks.commands.import_weights", "SRC --out DIR: a checkpoint of Wan, Self-Forcing and others, or a LoRA on one"),
    "export": ("tasks.commands.export", "--to diffusers|self-forcing --model DIR --out OUT: a folder for `cf generate`; the way back"),
    "generate": ("tasks.commands.video.one", "--model DIR --prompt TEXT --out FILE.mp4: a video from such a folder; without --model, the stage"),
    "curves": ("tasks.commands.curves", "STAGE [VALUE ...]: what a training stage says of itself, in the terminal, while it runs or after"),
    "compare": ("tasks.commands.compare.page", "RUN_A RUN_B --out compare.html: two runs on one page; folders, revisions or experiments"),
    "wandb": ("tasks.wandb_log.sync", "sync | list: offline runs; killed ones are completed, then all are sent"),
    "remote": ("flows.project.dvc_remote", "add NAME URL | check | push | pull | mend: the DVC remote, by which machines hand over"),
    "pipeline": ("flows.pipeline", "[--profile NAME] [--set KEY=VALUE] [--from STAGE] [--dry-run] ...: the stages, under Prefect"),
    "runs": ("flows.project.worktree", "list | prune: runs that had a checkout of their own, in .runs/"),
    "check-golden": ("tasks.commands.golden.check", "DIR: model, memory, losses and rollouts against vectors of Self-Forcing and LongLive"),
    "up": ("flows.machine.up:up", "the Prefect server, a worker and the watch on 127.0.0.1, or what of them doesn't run"),
    "down": ("flows.machine.up:down", "stops them, and everything they started"),
    "deploy": ("flows.machine.deploy", "pipeline, nightly and evaluate as deployments, with their run forms"),
    "promote": ("flows.night.promotion:promote", "[VERSION|COMMIT]: makes a student the promoted one, by hand"),
    "rollback": ("flows.night.promotion:roll_back", "[VERSION]: makes one that was promoted before the promoted one again"),
    "promoted": ("flows.night.promotion:show", "[--out DIR]: the promoted student, and its weights by its tag"),
    "history": ("flows.night.promotion:told", "nights, versions, promotions and rollbacks, oldest first"),
    "verify": ("flows.project.dvc_lock", "[STAGE ...]: hashes the outs again and compares them with dvc.lock"),
    "nightly-check": ("flows.machine.alerts", "[--hours 26]: for cron; tells someone when nights don't happen, without any server"),
    "doctor": ("flows.doctor.command", "[--json] [--fix]: versions, ports, disk, GPU, remotes, schedules, stale locks, and what to do"),
}
TRAINING = ("base", "teacher", "causal_init", "stage1", "stage2")  # what `cf plan` knows, and refuses where it can't fit
VIDEO = {"--model", "--prompt", "--prompts-file"}  # with one of these `cf generate` is not the stage
EXAMPLES = """examples:
  cf profile use smoke && dvc repro          the whole pipeline, small
  dvc exp run -S stage2.teacher.context=none one value changed: reruns stage2 and what follows
  cf STAGE --help                            a stage's files, and its line in dvc.yaml
  cf plan --gpus 8 --gpu-memory 80           what training needs, before it starts
  cf check-golden tests/golden/wan-causal    numbers of the released code, made here

Parameters come from params.yaml; CF_TRACEBACK=1 shows where an error was raised; WANDB_MODE=online|offline|disabled
overrides tracking.wandb; CF_IGNORE_PLAN=1 starts a stage that `cf plan` says won't fit."""


def main(argv: list[str]) -> None:
    """Everything but the process around it: no exec, no exit code."""
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(overview())
    elif command in stages() and not from_a_model(argv):
        run_stage(command, argv[1:])
    elif command in COMMANDS:
        module, _, function = COMMANDS[command][0].partition(":")
        getattr(importlib.import_module(module), function or "main")(argv[1:])
    else:
        known = ", ".join(dict.fromkeys([*stages(), *COMMANDS]))
        raise Refused(f"{command} is neither a stage nor a command; known are {known}")


def cli() -> NoReturn:
    """The process: a repeatable environment first, then one sentence for what was refused and a traceback for bugs."""
    argv = sys.argv[1:]
    try:
        if argv and argv[0] in stages() and not {"-h", "--help"} & set(argv):
            repeatable(argv)
            in_ranks(argv)
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        whole = os.environ.get("CF_TRACEBACK") == "1" or not deliberate(error)
        if "CF_RANK" in os.environ:
            said = traceback.format_exc() if whole else " ".join(str(error).split())
            importlib.import_module("tasks.runner.ranks").failed(said, 2 if isinstance(error, Refused) else 1)
        if whole:
            raise
        print(f"cf {argv[0] if argv else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Refused) else 1)
    sys.exit(0)


def in_ranks(argv: list[str]) -> None:
    """A training stage in several processes (tasks/runner/ranks.py), of which this one then is none."""
    from tasks.runner import ranks

    if ranks.rank() is not None or from_a_model(argv):
        return
    if argv[0] not in ranks.STAGES:
        return
    file = command_line(argv[0], importlib.import_module(f"tasks.{argv[0]}").run).parse_args(argv[1:]).params
    count = ranks.wanted(argv[0], yaml_file.read(file))
    if count > 1:
        sys.exit(ranks.launch(argv[0], count))


def from_a_model(argv: list[str]) -> bool:
    return argv[:1] == ["generate"] and any(word.split("=")[0] in VIDEO for word in argv)


def repeatable(argv: list[str]) -> None:
    """Starts this process again, once, with what must be known before libraries load: threads, hashes, malloc."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--threads", default="1")
    given = parser.parse_known_args(argv)[0]
    wanted = {
        "OMP_NUM_THREADS": given.threads if from_a_model(argv) else str(yaml_file.read(given.params).get("threads", 1)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONHASHSEED": "0",
        # Freed tensors stay with the process. Handing 24 MB back to the kernel and taking it again at each step of a loop
        # cost three times the arithmetic in it.
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def deliberate(error: BaseException) -> bool:
    """Was it raised on purpose? A refusal, a full disk, or a ValueError that a `raise` in our own code made: the message is
    then written for a person. The same types out of a library are bugs, and keep their traceback."""
    if isinstance(error, Refused) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return True
    if not isinstance(error, ValueError | FileNotFoundError | NotImplementedError):
        return False
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    if where is None or not where.tb_frame.f_globals.get("__name__", "").startswith(("tasks.", "cf_model.", "flows.")):
        return False
    lines = Path(where.tb_frame.f_code.co_filename).read_text().splitlines()
    return lines[where.tb_lineno - 1].lstrip().startswith("raise ")


# ---------------------------------------------------------------------------------------------------------- stages


def stages() -> dict[str, str]:
    """Stage -> what its file says it is, in the order of dvc.yaml. Found without importing anything."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            said = (ast.get_docstring(tree) or "").split("\n")[0]
            found[file.stem] = re.split(r"\. (?=[A-Z])", said.split(": ", 1)[-1])[0].rstrip(".")
    order = list(_pipeline())
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _pipeline() -> dict[str, Any]:
    return yaml_file.read(PIPELINE)["stages"] if PIPELINE.exists() else {}


def run_stage(stage: str, argv: list[str]) -> None:
    run = importlib.import_module(f"tasks.{stage}").run
    parser = command_line(stage, run)
    if stage == "generate" and {"-h", "--help"} & set(argv):
        print(importlib.import_module("tasks.commands.video.one").parser().format_help())
        print("Without --model it is the stage:\n")
    paths = vars(parser.parse_args(argv))
    file = paths.pop("params")

    from tasks.params import schema
    from tasks.runner import (
        execute,  # after the stage: the runner seeds torch only where the stage has imported it
        ranks,
    )

    stated = schema.load(file)
    if ranks.rank() is not None:
        ranks.join()
    if ranks.rank():
        ranks.follow(stage, run, paths, stated)
        return
    if stage in TRAINING:
        importlib.import_module("tasks.commands.plan.forecast").refuse(stated, stage, paths["out"], execute.WORK / stage)
    execute.execute(stage, run, paths, stated, yaml_file.read(file), began=BEGAN, announce=ranks.announce)


def command_line(stage: str, run: Callable[..., Any]) -> argparse.ArgumentParser:
    """One option for each keyword-only parameter of `run`, of its type; required unless it has a default."""
    entry = _pipeline().get(stage, {})
    epilog = f"in dvc.yaml:\n  {' '.join(entry['cmd'].split())}" if entry else None
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"cf {stage}", description=inspect.getdoc(run), epilog=epilog, formatter_class=form)
    hints = typing.get_type_hints(run)
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        kind = next(one for one in (Path, str) if one in (hints[name], *typing.get_args(hints[name])))
        required = parameter.default is parameter.empty
        text = None if required or parameter.default is None else f"default: {parameter.default}"
        default = None if required else parameter.default
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, required=required, default=default, help=text)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    return parser


def overview() -> str:
    rows = "\n".join(f"  {name:<14} {said}" for name, said in stages().items())
    others = "\n".join(f"  {name:<14} {said}" for name, (_, said) in COMMANDS.items())
    return f"""usage: cf STAGE --NAME PATH ... | cf COMMAND ...; `--help` after either says more

stages, in the order dvc.yaml runs them:
{rows}

commands:
{others}

{EXAMPLES}"""


if __name__ == "__main__":
    cli()
