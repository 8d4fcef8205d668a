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
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import params_file
from .params_file import Refused

BEGAN = time.time()
PIPELINE = Path("dvc.yaml")
PROFILES = Path("profiles")
COMMANDS = {"import-weights": "tasks.import_weights", "export": "tasks.export"}  # name -> file with `main`
VIDEO = {"--model", "--prompt", "--prompts-file"}  # with one of these `cf generate` is no stage: it makes videos from a model folder
EXAMPLES = """examples:
  cf profile use smoke && dvc repro          the whole pipeline, small
  dvc exp run -S stage2.teacher.context=none one value changed: reruns stage2 and what follows
  cf STAGE --help                            a stage's files, and its line in dvc.yaml

Parameters come from params.yaml; CF_TRACEBACK=1 shows where an error was raised; WANDB_MODE=online|offline|disabled
overrides tracking.wandb."""


def main(argv: list[str]) -> None:
    """Everything but the process around it: no exec, no exit code."""
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(overview())
    elif command == "profile":
        profile(argv[1:])
    elif command in COMMANDS:
        importlib.import_module(COMMANDS[command]).main(argv[1:])
    elif from_a_model(argv):
        importlib.import_module("tasks.video").main(argv[1:])
    elif command in stages():
        run_stage(command, argv[1:])
    else:
        known = ", ".join([*stages(), "profile", *COMMANDS])
        raise Refused(f"{command} is neither a stage nor a command; known are {known}")


def cli() -> NoReturn:
    """The process: a repeatable environment first, then one sentence for what was refused and a traceback for bugs."""
    argv = sys.argv[1:]
    try:
        if argv and argv[0] in stages() and not {"-h", "--help"} & set(argv):
            repeatable(argv)
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CF_TRACEBACK") == "1" or not deliberate(error):
            raise
        print(f"cf {argv[0] if argv else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Refused) else 1)
    sys.exit(0)


def from_a_model(argv: list[str]) -> bool:
    return argv[:1] == ["generate"] and any(word.split("=")[0] in VIDEO for word in argv)


def repeatable(argv: list[str]) -> None:
    """Starts this process again, once, with what must be known before libraries load: threads, hashes, malloc."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--threads", default="1")
    given = parser.parse_known_args(argv)[0]
    wanted = {
        "OMP_NUM_THREADS": given.threads if from_a_model(argv) else str(params_file.read(given.params).get("threads", 1)),
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
    if where is None or not where.tb_frame.f_globals.get("__name__", "").startswith(("tasks.", "cf_model.")):
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
    return params_file.read(PIPELINE)["stages"] if PIPELINE.exists() else {}


def run_stage(stage: str, argv: list[str]) -> None:
    run = importlib.import_module(f"tasks.{stage}").run
    parser = command_line(stage, run)
    if stage == "generate" and {"-h", "--help"} & set(argv):
        print(importlib.import_module("tasks.video").parser().format_help())
        print("Without --model it is the stage:\n")
    paths = vars(parser.parse_args(argv))
    file = paths.pop("params")

    from . import params, runner  # after the stage: the runner seeds torch only where the stage has imported it

    runner.execute(stage, run, paths, params.load(file), params_file.read(file), began=BEGAN)


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
    rows = "\n".join(f"  {name:<12} {said}" for name, said in stages().items())
    return f"""usage: cf STAGE --NAME PATH ... | cf profile list | cf profile use NAME

stages, in the order dvc.yaml runs them:
{rows}

commands:
  profile list the complete parameter files in profiles/
  profile use  NAME: writes params.yaml from profiles/NAME.yaml
  import-weights SRC --out DIR: a checkpoint of Wan, Self-Forcing and others, or a LoRA on one
  export       --to diffusers|self-forcing --model DIR --out OUT: a model folder to generate with; the way back
  generate     --model DIR --prompt TEXT --seconds 60 --out FILE.mp4: a video from a model folder (without --model: the stage)

{EXAMPLES}"""


# -------------------------------------------------------------------------------------------------------- profiles


def profile(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf profile", description="The complete parameter files in profiles/.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="their names, and what each says it is")
    verbs.add_parser("use", help="write params.yaml from one of them").add_argument("name")
    args = parser.parse_args(argv)
    found = {file.stem: file for file in sorted(PROFILES.glob("*.yaml"))}
    if args.verb == "list":
        for name, file in found.items():
            first = file.read_text().split("\n", 1)[0]
            print(f"{name:<12} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
        return
    if args.name not in found:
        raise Refused(f"profile {args.name} isn't in {PROFILES}/; known are {', '.join(found) or 'none'}")
    file = found[args.name]
    header = f"# From {file.as_posix()} by `cf profile use {args.name}`; change a value there, here, or with `dvc exp run -S key=value`.\n"
    Path("params.yaml").write_text(header + file.read_text())
    print(f"params.yaml now holds profile {args.name}")


if __name__ == "__main__":
    cli()
