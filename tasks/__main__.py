"""The `cf` command, also `python -m tasks`: one stage of dvc.yaml by hand, and the commands around the pipeline."""

import argparse
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from tasks.files.options import read_commands, read_table
from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tasks.runner.process import fix_environment, is_deliberate, pause_collection

TARGETS = {name: entry["module"] for name, entry in read_commands().items()}  # module, or module:function instead of `main`
VIDEO = {"--model", "--prompt", "--prompts-file"}  # options of `cf video`, by which it is told from the stage `generate`


def cli() -> NoReturn:
    """Run `cf` as a process: print a refusal as one sentence and a bug with its traceback; exit with 2, or 1."""
    argv = sys.argv[1:]
    try:
        if argv and not {"-h", "--help"} & set(argv) and (argv[0] in ("video", "score", "sample") or argv[0] not in TARGETS):
            fix_environment()
            if argv[0] not in TARGETS:
                pause_collection()  # execute.py goes on with it when a stage begins its work
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        with_traceback = os.environ.get("CF_TRACEBACK") == "1" or not is_deliberate(error)
        message, code = " ".join(str(error).split()), 2 if isinstance(error, Refused) else 1
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: its launcher prints the cause
            from tasks.runner.ranks import report_failure

            report_failure(traceback.format_exc() if with_traceback else message, code)
        if with_traceback:
            raise
        print(f"cf {argv[0] if argv else ''}: {message}", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)


def main(argv: list[str]) -> None:
    """Run a command or a stage in this process; errors are raised."""
    command, options = argv[0] if argv else "--help", argv[1:]
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--params", type=Path, default=Path("params.yaml"))
    early.add_argument("--threads", default="1")
    given = early.parse_known_args(options)[0]
    logging.getLogger("cf_model").setLevel(logging.INFO)  # which attention kernel was chosen, and why
    logging.getLogger("cf_model").addHandler(logging.StreamHandler())
    project = Project(given.params)
    if command == "generate" and any(word.split("=")[0] in VIDEO for word in options):
        print("cf generate --model: this command is now called `cf video`", file=sys.stderr)
        command = "video"
    if command == "evaluate" and any(word.split("=")[0] == "--videos" for word in options):
        command = "score"  # the stage of this name takes --samples
    if command in ("-h", "--help"):
        print(describe_commands(project))
    elif command in TARGETS:
        if command in ("video", "score", "sample"):
            os.environ["OMP_NUM_THREADS"] = given.threads
        module, _, function = TARGETS[command].partition(":")
        getattr(importlib.import_module(module), function or "main")(options)
    elif command in project.stages:
        # Before any library is imported, because they read it when they are loaded.
        os.environ["OMP_NUM_THREADS"] = str(project.tree.get("threads", 1))
        from tasks.runner.ranks import run_stage

        run_stage(command, options, project)
    else:
        stages = "" if project.pipeline.exists() else f"; there is no {project.pipeline} here, run cf at the root of the project"
        raise Refused(f"{command} is neither a stage nor a command; known are {', '.join([*project.stages, *TARGETS])}{stages}")


def describe_commands(project: Project) -> str:
    """Return what `cf --help` prints."""
    groups = {"stages, in the order dvc.yaml runs them": {name: entry["desc"] for name, entry in project.stages.items()}}
    for name, entry in read_commands().items():
        groups.setdefault(entry["heading"], {})[name] = entry["summary"]
    rows = [f"{heading}:\n" + "\n".join(f"  {name:<14} {text}" for name, text in group.items()) for heading, group in groups.items()]
    usage = "usage: cf STAGE --NAME PATH ... | cf COMMAND ...; `--help` after either says more"
    return "\n\n".join([usage, *rows, read_table()["epilog"]])


if __name__ == "__main__":
    cli()
