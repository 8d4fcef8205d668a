"""CPU time of what surrounds the computation: the command's help, a stage without work, `dvc repro` and the flow with nothing to do.

  python -m benchmarks overhead            some minutes of one core; writes results/overhead.json

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

from benchmarks.common.machine import describe_machine, write_result
from tasks.params.project import Project

ROUNDS = 3
GOALS = {"cf --help": 0.5, "dvc repro": 3.0, "python -m flows.pipeline": 8.0}
STAGE_GOAL = 4.0
# a stage that does nothing but write its out
WITHOUT_WORK = """
import inspect, sys
import tasks.__main__, tasks.{stage} as stage
def run(params, track, *, out, **paths):
    out.mkdir()
    return {{}}
run.__signature__ = inspect.signature(stage.run)
stage.run = run
sys.argv[0] = 'cf'
tasks.__main__.main(sys.argv[1:])
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


def report(rows: list[dict[str, Any]]) -> None:
    """Print the newest row and write all of them."""
    print(rows[-1], flush=True)
    write_result("overhead", {"machine": describe_machine(), "unit": "seconds of CPU time, children included", "rows": rows})


def main() -> None:
    python, rows = sys.executable, []
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
        for name, words in commands.items():
            rows.append({"command": name} | measure(words, folder) | ({"goal": GOALS[name]} if name in GOALS else {}))
            report(rows)
        for stage in ("filter", "stage2", "generate", "evaluate"):
            options = Project(folder / "params.yaml").stage(stage)["cmd"].split()[3:]
            words = [python, "-c", WITHOUT_WORK.format(stage=stage), *options]
            rows.append({"command": f"cf {stage}, without its work"} | measure(words, folder) | {"goal": STAGE_GOAL})
            report(rows)
    missed = [row["command"] for row in rows if row["cpu_seconds"] > row.get("goal", float("inf"))]
    if missed:
        sys.exit(f"above their goals: {', '.join(missed)}")


if __name__ == "__main__":
    main()
