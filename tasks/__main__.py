"""The `cf` command, also `python -m tasks`: one stage of dvc.yaml by hand, and the commands around the pipeline."""

import argparse
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tasks.runner.process import fix_environment, is_deliberate

COMMANDS = {  # heading -> command -> its module (or module:function, instead of `main`), and what `cf --help` says
    "parameters": {
        "profile": ("tasks.commands.preset:use_profile", "list | use NAME: the complete parameter files in profiles/"),
        "preset": ("tasks.commands.preset", "list | use NAME: published methods in presets/, laid over params.yaml"),
        "plan": ("tasks.commands.plan", "[--gpus 8 --gpu-memory 80]: memory, operations, hours and disk of every training stage"),
    },
    "runs": {
        "why": ("tasks.commands.why", "FILE: what became of a file of the clips folder, rule by rule"),
        "drift": ("tasks.commands.drift", "--new NAMES --out PAGE: new clips against the training set; a night makes it itself"),
        "repro": ("tasks.commands.repro", "[DVC'S OPTIONS]: `dvc repro`, with each stage's number and about how long it takes"),
        "curves": ("tasks.commands.curves", "STAGE [VALUE ...]: what a training stage logs, in the terminal, while it runs or after"),
        "control": ("tasks.commands.control", "stage 2 with a teacher that sees no context, beside this run's stage 2, video by video"),
        "compare": ("tasks.commands.compare", "RUN_A RUN_B --out compare.html: two folders, revisions or experiments on one page"),
        "sample": ("tasks.commands.sample", "--system NAME --weights DIR --prompts FILE --out DIR: a system's videos, to be scored"),
        "score": ("tasks.commands.score", "--videos DIR --out FILE: VBench, the papers' windows, drift and seams, of any videos"),
        "fetch-weights": ("tasks.commands.fetch_weights", "--out DIR: the networks that `cf score` compares frames with"),
        "vbench": ("tasks.commands.vbench", "--videos DIR --manifest FILE --out DIR: in VBench's naming, for its official scripts"),
        "verify": ("flows.project.dvc_lock", "[STAGE ...]: hashes the outs again and compares them with dvc.lock"),
        "check-golden": ("tasks.commands.check_golden", "DIR: this code against recorded numbers of Self-Forcing and LongLive"),
        "wandb": ("tasks.wandb_log.sync", "sync | list: runs of W&B that are on this machine, and sending them"),
        "remote": ("flows.project.dvc_remote", "add NAME URL | check | push | pull | mend: the DVC remote, by which machines hand over"),
    },
    "models": {
        "video": ("tasks.commands.video", "--model DIR --prompt TEXT --out FILE.mp4: a video from an exported model"),
        "check-model": ("tasks.commands.check_model", "DIR [--stage stage2]: whether it is a whole model that fits params.yaml"),
        "export": ("tasks.commands.export", "--to diffusers|self-forcing --model DIR --out OUT: a folder for `cf video`; the way back"),
        "import-weights": ("tasks.commands.import_weights", "SRC --out DIR: a checkpoint of Wan, Self-Forcing and others, or a LoRA"),
    },
    "nights, on this machine": {
        "up": ("flows.machine.up:start_machine", "starts the Prefect server, a worker and the watch on 127.0.0.1"),
        "down": ("flows.machine.up:stop_machine", "stops them, and everything they started"),
        "deploy": ("flows.machine.deploy", "pipeline, nightly and evaluate as deployments, with their run forms"),
        "pipeline": ("flows.pipeline", "[--profile NAME] [--set KEY=VALUE] [--from STAGE] [--dry-run] ...: the stages, under Prefect"),
        "runs": ("flows.project.worktree", "list | prune | open NAME DIR: runs that had a checkout of their own, in .runs/"),
        "gc": ("flows.project.gc", "[--delete]: what of the DVC cache no branch, tag, experiment or worktree names"),
        "promote": ("flows.night.promotion:promote_student", "[VERSION|COMMIT]: makes a student the promoted one, by hand"),
        "rollback": ("flows.night.promotion:roll_back_student", "[VERSION]: makes one that was promoted before the promoted one again"),
        "promoted": ("flows.night.promotion:show_promoted", "[--out DIR]: the promoted student, and its weights by its tag"),
        "history": ("flows.night.promotion:show_history", "nights, versions, promotions and rollbacks, oldest first"),
        "nightly-check": ("flows.machine.alerts", "[--hours 26]: for cron; alerts when nights do not happen, without any server"),
        "env": ("tasks.params.environment", "every CF_* variable of the environment: its value here, its default and its meaning"),
        "doctor": ("flows.doctor.command", "[--json] [--fix]: checks versions, ports, disk, GPU, remotes, schedules and locks"),
    },
}
TARGETS = {name: target for group in COMMANDS.values() for name, (target, _) in group.items()}
VIDEO = {"--model", "--prompt", "--prompts-file"}  # options of `cf video`, by which it is told from the stage `generate`
EXAMPLES = """examples:
  cf profile use smoke && cf repro           the whole pipeline, small
  dvc exp run -S stage2.teacher.context=none one value changed: reruns stage2 and what follows
  cf STAGE --help                            a stage's files, and its line in dvc.yaml
  cf plan --gpus 8 --gpu-memory 80           what training needs, before it starts
  cf check-golden tests/golden/wan-causal    numbers of the released code, made here

Parameters come from params.yaml; CF_TRACEBACK=1 shows where an error was raised; WANDB_MODE=online|offline|disabled
overrides tracking.wandb; CF_IGNORE_PLAN=1 starts a stage that `cf plan` says won't fit."""


def cli() -> NoReturn:
    """Run `cf` as a process: print a refusal as one sentence and a bug with its traceback; exit with 2, or 1."""
    argv = sys.argv[1:]
    try:
        if argv and not {"-h", "--help"} & set(argv) and (argv[0] in ("video", "score", "sample") or argv[0] not in TARGETS):
            fix_environment()
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
    groups |= {heading: {name: text for name, (_, text) in group.items()} for heading, group in COMMANDS.items()}
    rows = [f"{heading}:\n" + "\n".join(f"  {name:<14} {text}" for name, text in group.items()) for heading, group in groups.items()]
    usage = "usage: cf STAGE --NAME PATH ... | cf COMMAND ...; `--help` after either says more"
    return "\n\n".join([usage, *rows, EXAMPLES])


if __name__ == "__main__":
    cli()
