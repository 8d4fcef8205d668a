"""CPU time of what surrounds the computation: the command's help, a stage without work, `dvc repro` and the flow with nothing to do.

  python -m benchmarks overhead [COMMAND ...]     some minutes of one core; writes results/overhead.json, whose other rows stay

Everything runs in a clone of this checkout whose outs are small stand-ins that DVC believes in, so nothing has to be done. A stage's
fixed cost is everything but its work: imports, parameters, the plan's check, the hashes of its dependencies, tracking. CPU time is that
of the process and of all that it waited for, Prefect's temporary server included.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common.machine import describe_machine, read_result, write_result
from tasks.params.project import Project

ROUNDS = 3
GOALS = {"cf --help": 0.5, "dvc repro": 3.0, "python -m flows.pipeline": 8.0}
STAGE_GOAL = 4.0
# a stage that does nothing but write its out
WITHOUT_WORK = """
import importlib, inspect, sys
import tasks.__main__
def run(params, track, *, out, **paths):
    out.mkdir()
    return {{}}
def load(name, package=None, real=importlib.import_module):
    module = real(name, package)
    if name == 'tasks.{stage}':
        run.__signature__ = inspect.signature(module.run)
        module.run = run
    return module
importlib.import_module = load
sys.argv[0] = 'cf'
tasks.__main__.cli()
"""


def make_clone(folder: Path) -> None:
    """Clone this checkout and put a stand-in where an out or a dependency is missing, then let DVC take all of them for made."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    stages = Project(folder / "params.yaml").stages.values()
    names = [entry for stage in stages for key in ("outs", "metrics", "plots", "deps") for entry in stage.get(key, [])]
    for name in names:
        path = folder / (next(iter(name)) if isinstance(name, dict) else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and path.suffix:
            path.write_text("{}")
        elif not path.exists():
            path.mkdir()
            for number in range(20):
                (path / f"{number}.txt").write_text(f"{path.name} {number}")
    subprocess.run(["dvc", "commit", "--force", "--quiet"], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def measure(words: list[str], folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run a command some times; return the CPU seconds of it and its children, of which the first run may make files for the others."""
    seconds = []
    environment = {**os.environ, "PYTHONPATH": str(folder), "WANDB_MODE": "offline", "PREFECT_HOME": str(folder.parent / "prefect")}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"{' '.join(words)[:80]} failed:\n{done.stderr[-2000:]}")
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"cpu_seconds": round(statistics.median(seconds), 2), "range": [round(min(seconds), 2), round(max(seconds), 2)]}


def report(row: dict[str, Any], order: list[str]) -> None:
    """Print a row and write it into the result, in the order of the commands; a row says the commit and the load of its own run."""
    machine = describe_machine()
    row |= {"commit": machine["commit"], "load": machine["load"][0]}
    print(row, flush=True)
    rows = {old["command"]: old for old in read_result("overhead").get("rows", [])} | {row["command"]: row}
    about = {"machine": machine, "unit": "seconds of CPU time, children included"}
    write_result("overhead", about | {"rows": [rows[name] for name in order if name in rows]})


def main() -> None:
    python, wanted, missed = sys.executable, sys.argv[1:], list[str]()
    with tempfile.TemporaryDirectory(prefix="cf-overhead-") as scratch:
        folder = Path(scratch) / "clone"
        make_clone(folder)
        commands: dict[str, list[str]] = {
            "python, which does nothing": [python, "-c", "pass"],
            "import torch": [python, "-c", "import torch"],
            "cf --help": [python, "-m", "tasks", "--help"],
            "dvc repro": ["dvc", "repro"],
            "cf repro": [python, "-m", "tasks", "repro"],
            "python -m flows.pipeline": [python, "-m", "flows.pipeline"],
        }
        stages = {f"cf {stage}, without its work": stage for stage in ("filter", "stage2", "generate", "evaluate")}
        for name, stage in stages.items():
            options = Project(folder / "params.yaml").stage(stage)["cmd"].split()[3:]
            commands[name] = [python, "-c", WITHOUT_WORK.format(stage=stage), *options]
        if unknown := [name for name in wanted if name not in commands]:
            sys.exit(f"{unknown[0]} is no row of this benchmark; known are {'; '.join(commands)}")
        for name in wanted or commands:
            row = {"command": name} | measure(commands[name], folder)
            if goal := GOALS.get(name, STAGE_GOAL if name in stages else None):
                row["goal"] = goal
                missed += [name] * (row["cpu_seconds"] > goal)
            report(row, list(commands))
    if missed:
        sys.exit(f"above their goals: {', '.join(missed)}")


if __name__ == "__main__":
    main()
