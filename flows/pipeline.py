"""The whole pipeline as one Prefect flow, with or without a server. It knows the stages by name and nothing of what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from prefect import flow, get_run_logger, runtime, task
from prefect.client.schemas.objects import State
from prefect.states import Completed

CHATTER = ("To track the changes with git", "\tgit add", "To enable auto staging", "Use `dvc push`", "\tdvc config core.autostage")


@task(task_run_name="{stage}")
def repro(stage: str) -> State[None]:
    """One stage in a process of its own. Its lines become the task's log; DVC decides whether there is anything to do."""
    logger, said = get_run_logger(), list[str]()
    # this interpreter's dvc, and this interpreter as the `python` of the stage's command
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"CF_RUN": runtime.flow_run.name, **os.environ, "PYTHONUNBUFFERED": "1", "PATH": path}
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        for line in process.stdout or ():
            if line.strip() and not line.startswith(CHATTER):
                said.append(line.rstrip())
                logger.info(said[-1])
    if process.returncode:
        raise RuntimeError("\n".join([f"{stage} failed", *said[-20:]]))
    unchanged = any("didn't change, skipping" in line or "is cached - skipping run" in line for line in said)
    return Completed(name="Cached" if unchanged else "Completed")


@flow(name="pipeline")
def pipeline() -> None:
    """Stages one after another: dvc.yaml lists them in running order. The first that fails ends the run."""
    for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"]:
        repro(stage)


if __name__ == "__main__":
    pipeline()
