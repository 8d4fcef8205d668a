"""`cf control`: the memoryless control of stage 2, and its comparison with the context teacher's student, video by video.

The control is stage 2 with everything the same but that the teacher is shown no context (stage2.teacher.context: none). It shares all
that comes before stage 2, makes the same videos, and is written below work/control; the run's own outs stay as they are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cf_model.evaluate.control import compare_students
from cf_model.evaluate.report import format_number
from tasks.files.atomic import delete_path
from tasks.files.json_lines import write_json
from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused, read_yaml, refuse_errors, write_yaml
from tasks.report import read_results

FOLDER, STUDENT = Path("work/control"), "stage2"
NEEDED = ("data/latents", "data/prompts", "models/codec", "models/teacher", "models/stage1", "models/stage2", "results/cells.jsonl")


def main(argv: list[str]) -> None:
    args = parse_options("control", argv, __doc__)
    root = Path.cwd()
    for path in NEEDED:
        if not (root / path).exists():
            raise Refused(f"there is no {path}; run `make repro` first, because the control is compared with its student")
    if not args.table_only:
        make_control(root, root / FOLDER)
    rows = read_students(root, root / FOLDER)
    write_json(root / FOLDER / "compared.json", rows)
    print(f"stage 2: context teacher, memoryless control, their paired difference (95 %, one training each); {FOLDER}/compared.json")
    for row in rows:
        ends = f"[{format_number(row['low'])}, {format_number(row['high'])}]" if "low" in row else ""
        numbers = " ".join(f"{format_number(row[name]):>8}" for name in ("context", "memoryless", "difference"))
        print(f"{row['suite']:14} {row['metric']:18} {numbers} {ends:18} n = {row['prompts']:3} {row['says']}")


def make_control(root: Path, folder: Path) -> None:
    """Train the control, generate its videos and measure them, with the commands of the stages. A second call goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    params = read_yaml(root / "params.yaml")
    params["stage2"]["teacher"]["context"] = "none"
    for suite in ("systems", "continuations"):
        params["generate"][suite] = {STUDENT: params["generate"][suite][STUDENT]}
    write_yaml(folder / "params.yaml", params)
    shutil.copyfile(root / "dvc.yaml", folder / "dvc.yaml")  # `cf` finds its stages there; DVC does not look below work/
    data, codec = root / "data/latents", root / "models/codec"
    models = {name: root / "models" / name for name in ("base", "teacher", "causal_init", "stage1")} | {STUDENT: folder / "models/stage2"}
    begin = {"teacher": models["teacher"], "student": root / params["start"]["stage2"]}
    run_stage(folder, STUDENT, latents=data, prompts=root / "data/prompts", codec=codec, **begin, out=models[STUDENT])
    run_stage(folder, "generate", codec=codec, latents=data, **models, out=folder / "samples")
    run_stage(folder, "evaluate", samples=folder / "samples", clips=root / "data/clips", out=folder / "results")


def run_stage(folder: Path, stage: str, **paths: Path) -> None:
    """Run a stage in `folder`; raises Refused where it fails, because it has said why."""
    options = [word for name, path in paths.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    delete_path(paths["out"])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_MODE": "disabled"}
    if subprocess.run([sys.executable, "-m", "tasks", stage, *options], cwd=folder, env=environment).returncode:
        raise Refused(f"{stage} failed in {folder}, see above; the same command goes on from there")


def read_students(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of both students (cf_model/evaluate/control.py), from what the stage evaluate wrote in the two folders."""
    params, sides = read_yaml(root / "params.yaml"), {"context": root, "memoryless": folder}
    read = {name: read_results(side / "results", side / "metrics", resamples=1, seed=0) for name, side in sides.items()}
    with refuse_errors():
        return compare_students(read, STUDENT, resamples=params["evaluate"]["resamples"], seed=params["seed"])
