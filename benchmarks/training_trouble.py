"""What trouble looks like: stage 1 of a finished run again, with one wrong setting each, for docs/training.md.

  python benchmarks/training_trouble.py [--project . --steps 60 --out docs]     writes training-trouble.png

Needs what `make repro` leaves behind in profile tiny. Each run is `cf stage1` with another params.yaml, in work/trouble; one
that is there already is not made again. The last line of each run's progress is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.training_curves import curves, draw, save
from tasks.params.yaml_file import read_yaml

RUNS: dict[str, dict[str, Any]] = {
    "as committed": {},
    "critic's lr x 30": {"stage1.critic_optimizer.lr": 30},
    "student's lr x 30": {"stage1.student_optimizer.lr": 30},
    "noise up to 0.1": {"flow.sigma_max": 0.1},
}
NAMES = ("critic_loss", "score_distance", "normaliser", "student_loss", "student_gradient", "ema_distance", "promotion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    out = args.out.absolute()
    os.chdir(args.project)
    rows = {name: curves(made(name, args.steps) / "metrics.csv") for name in RUNS}
    shape = {"sharex": True, "squeeze": False, "layout": "constrained"}
    figure, table = pyplot.subplots(len(NAMES), len(RUNS), figsize=(2.9 * len(RUNS), 1.4 * len(NAMES)), **shape)
    for line, value in zip(table, NAMES, strict=True):
        for axes, (name, found) in zip(line, rows.items(), strict=True):
            draw(axes, found[value], "C0")
            axes.set_title(f"{name}: {value}", fontsize=8)
            axes.tick_params(labelsize=7)
    save(figure, out / "training-trouble.png")


def made(name: str, steps: int) -> Path:
    """The out of one run."""
    folder = Path("work/trouble") / name.replace(" ", "-").replace("'", "")
    if folder.exists():
        return folder
    stated = read_yaml(Path("params.yaml"))
    stage = stated["stage1"]
    stage["steps"], stage["save_every"], stated["samples"]["stage1"]["every"] = steps, steps, 0
    for key, value in RUNS[name].items():
        *parents, last = key.split(".")
        inner = stated
        for part in parents:
            inner = inner[part]
        inner[last] = inner[last] * value if last == "lr" else value
    folder.parent.mkdir(parents=True, exist_ok=True)
    params = folder.with_suffix(".yaml")
    params.write_text(json.dumps(stated))  # JSON is YAML
    words = ["--latents", "data/latents", "--codec", "models/codec", "--base", "models/base", "--causal-init", "models/causal_init"]
    command = [sys.executable, "-m", "tasks", "stage1", *words, "--params", str(params), "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-1000:]}")
    print(f"{name}: {done.stderr.splitlines()[-1]}", flush=True)
    return folder


if __name__ == "__main__":
    main()
