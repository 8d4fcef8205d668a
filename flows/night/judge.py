"""Videos of one student for the nightly prompts, and their metrics: the commands of dvc.yaml's `generate` and `evaluate`, with other
paths and one system, in a folder of their own. Candidate and promoted student are measured the same way, so they can be compared.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.night.gate import Measured
from flows.night.state import NightPlan
from flows.project.dvc_graph import Stage
from flows.run.stage_task import TAIL_LINES, count_gpus
from flows.supervise.command import run_logged
from flows.supervise.environment import stage_environment
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import read_json_lines, read_json_object
from tasks.params.yaml_file import read_yaml, write_yaml

GENERATE, EVALUATE, STUDENT, SUITE = "generate", "evaluate", "stage2", "prompts"
NAME = "student"  # of the measured system, in nightly.rules too


@task(name="judge", cache_policy=NO_CACHE)
def measure_student(
    plan: NightPlan, name: str, stages: Mapping[str, Stage], *, student: Path, codec: Path, prompts: Path | None, version: str | None = None
) -> Measured:
    """Generate and evaluate in work/judged/NAME of the night's worktree. A second attempt makes only the videos that are missing."""
    folder = plan.root / "work/judged" / name
    folder.mkdir(parents=True, exist_ok=True)
    samples, params = folder / "samples", folder / "params.yaml"
    write_yaml(params, nightly_parameters(read_yaml(plan.root / "params.yaml"), prompts))
    shutil.copyfile(plan.root / "dvc.yaml", folder / "dvc.yaml")  # `cf` finds its stages there; DVC does not look below work/
    _run_stage(plan, folder, stages[GENERATE], {STUDENT: student, "codec": codec, "out": samples, "params": params})
    _run_stage(plan, folder, stages[EVALUATE], {"samples": samples, "out": folder / "results", "params": params})
    rows = read_json_lines(samples / "index.jsonl")
    videos = [(str(row["prompt"]), int(row["seed"])) for row in rows if (row["suite"], row["system"]) == (SUITE, NAME)]
    numbers = json.loads((folder / f"metrics/{EVALUATE}.json").read_text())
    return Measured(md5=compute_dvc_md5(student, again=True), numbers=numbers, videos=videos, version=version)


def compare_students(plan: NightPlan) -> list[dict[str, Any]]:
    """Compare the cells of both measured students by `cf compare`: a row for each metric, candidate minus promoted student, paired.

    Empty, with the reason in the log, if the comparison fails: the gate's rules need means alone.
    """
    folder, out = plan.root / "work/judged", plan.root / "work/judged/compare.json"
    out.unlink(missing_ok=True)  # of an attempt before
    words = [sys.executable, "-m", "tasks", "compare", str(folder / "promoted"), str(folder / "candidate"), "--out", str(out)]
    environment = stage_environment(plan.run, plan.root, plan.repo) | {"PYTHONPATH": str(plan.root)}
    run_logged(words, log=plan.log, cwd=plan.root, env=environment)
    rows: list[dict[str, Any]] = read_json_object(out).get("rows", [])
    return rows


def nightly_parameters(params: Mapping[str, Any], prompts: Path | None) -> dict[str, Any]:
    """Return params.yaml's tree with the nightly seeds and prompts (a file, or else held-out captions), and the student as its system.

    Raises ValueError if generate.systems has no system with the weights of stage 2.
    """
    night, generate = params["nightly"], params["generate"]
    system = next((system for system in generate["systems"].values() if system["weights"] == STUDENT), None)
    if system is None:
        raise ValueError(f"generate.systems has no system whose weights are {STUDENT}, so there is nothing to judge")
    changed = {"systems": {NAME: system}, "continuations": {}, "continued": 1}
    changed |= {"prompts": night["prompts"], "seeds": night["seeds"], "prompts_file": prompts and str(prompts)}
    return {**params, "generate": {**generate, **changed}}


def stage_command(root: Path, stage: Stage, paths: Mapping[str, Path]) -> list[str]:
    """Return the stage's own command with all its paths made absolute, and the options in `paths` in place of its own."""
    words = shlex.split(stage.command)
    if words[:3] != ["python", "-m", "tasks"]:
        raise ValueError(f"the command of {stage.name} in dvc.yaml is no `python -m tasks ...`")
    options = dict(zip(words[4::2], (str(root / path) for path in words[5::2]), strict=True))
    options |= {f"--{name}": str(path) for name, path in paths.items()}
    return [sys.executable, "-m", "tasks", stage.name, *(word for pair in options.items() for word in pair)]


def _run_stage(plan: NightPlan, folder: Path, stage: Stage, paths: Mapping[str, Path]) -> None:
    """Run a stage's command in `folder`, with the code of the night's worktree, without W&B. Raises RuntimeError with the last lines."""
    log = get_run_logger().info
    # PYTHONPATH, because in another folder `python -m tasks` would run the checkout that is installed
    variables = {**stage_environment(plan.run, plan.root, plan.repo), "PYTHONPATH": str(plan.root), "WANDB_MODE": "disabled"}
    words, gpus = stage_command(plan.root, stage, paths), count_gpus(stage, log)
    code, lines = run_logged(words, log=log, cwd=folder, env=variables, gpus=gpus, timeout=stage.timeout)
    if code:
        raise RuntimeError("\n".join([f"{stage.name} of {folder.name} failed", *lines[-TAIL_LINES:]]))
