"""Cells: what one training gave, as lines of JSON that are committed in study/cells. All of docs/evidence.md is derived from them.

The first line says what was run: world, arm, seed, key of its parameters, md5 of its code, optimiser steps, operations, seconds and
machine. Each further line is one metric of one system: a value for each reported clip, or, where all videos are measured together or
only their mean is kept, the mean alone.
"""

import base64
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cf_model.data.video_reader import read_video
from cf_model.evaluate.cells import expand_lines, group_values
from cf_model.plan.forecast import estimate_needs
from study import nodes
from study.nodes import MADE, STUDY, WORK, build_params, compute_cell_key, hash_code, locate_weights, open_folder
from study.plan import Cell, Plan
from tasks.commands.control import run_stage
from tasks.files.atomic import delete_path, write_atomically
from tasks.files.json_lines import Row, dump_json_lines, load_json_object, read_json_lines
from tasks.params.load import validate_params

CELLS = STUDY / "cells"
DRIFT = "sky_error"  # the curve whose last third less its first third is `drift`
STRIP = 8  # pictures of a strip
MACHINE = ("cpu", "cores", "memory_gib", "python", "system", "load")  # of runtime/<stage>.json


def measure_cell(plan: Plan, cell: Cell) -> None:
    """Make a cell's videos, measure them with the pipeline's own stages, and write study/cells/<profile>/<name>.jsonl."""
    folder, clips = open_folder(plan, cell.name), MADE / plan.profile / cell.world / ("reporting" if cell.counted else "validation")
    weights, samples, results = choose_weights(plan, cell), folder / "samples", folder / "results"
    run_stage(
        folder, "generate", codec=MADE / plan.profile / cell.world / "training/codec", latents=clips / "latents", **weights, out=samples
    )
    run_stage(folder, "evaluate", samples=samples, clips=clips / "clips", out=results)
    rows = [describe_cell(plan, cell), *collect_metrics(plan, folder)]
    if cell.seed == min(one.seed for one in plan.cells if (one.world, one.arm) == (cell.world, cell.arm)):
        rows += cut_strips(plan, cell, samples)
    file = locate_cell(plan, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, dump_json_lines(rows))
    delete_path(samples)
    delete_path(results)


def choose_weights(plan: Plan, cell: Cell) -> dict[str, Path]:
    """Return the weights that `generate` is given for a cell, by its options.

    `generate` wants all options and refuses what is not there. A cell needs few of the models, and the others may not be made yet, or
    never: base stands in their place, and nothing reads it.
    """
    paths, found = locate_weights(plan, cell), build_params(plan, cell.world, cell.seed, arm=cell.arm)["generate"]
    needed = {system["weights"] for suite in ("systems", "continuations") for system in found[suite].values()}
    return {name: path if name in needed else paths["base"] for name, path in paths.items() if name != "scores"}


def locate_cell(plan: Plan, cell: Cell) -> Path:
    """Return where a cell is committed."""
    return CELLS / plan.profile / f"{cell.name}.jsonl"


def describe_cell(plan: Plan, cell: Cell) -> Row:
    """Return a cell's first line."""
    about, file = plan.trained_arm(cell.arm), WORK / plan.profile / cell.name / "params.yaml"
    params = validate_params(json.loads(file.read_text()), file)
    shared = {"base": "", "teacher": f"-teacher_{about.teacher}", "causal_init": f"-init_{about.init}", "stage1": f"-init_{about.init}"}
    places = {stage: f"{cell.world}-{cell.seed}{suffix}" for stage, suffix in shared.items()}
    places |= {
        "stage2": f"{cell.world}-{cell.seed}-{plan.arms[cell.arm].weights or cell.arm}",
        "generate": cell.name,
        "evaluate": cell.name,
    }
    runtimes = {
        stage: load_json_object(WORK / plan.profile / name / f"runtime/{stage}.json", missing_ok=True) for stage, name in places.items()
    }
    row = {"kind": "cell", "world": cell.world, "arm": cell.arm, "seed": cell.seed, "counted": cell.counted}
    row |= {"key": compute_cell_key(plan, cell), "code": hash_code()}
    if about.student == "stage2":
        row |= {"steps": params.stage2.steps, "updates": params.stage2.student_updates, "batch": params.stage2.batch}
        row["tflop"] = round(estimate_needs(params)["stage2"].total / 1e12, 3)
    row["seconds"] = {stage: facts["wall_seconds"] for stage, facts in runtimes.items() if facts}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return row | {"machine": {name: runtimes["evaluate"].get(name) for name in MACHINE} | {"gpu": gpu}}


def collect_metrics(plan: Plan, folder: Path) -> Iterator[Row]:
    """Yield a line for each of the plan's metrics and each system, and the mean curves of its prompts' videos."""
    wanted = {(metric.suite, metric.name) for metric in plan.metrics.values()}
    source = folder / "results/cells.jsonl"
    measured = group_values(expand_lines(read_json_lines(source), str(source)), lambda cell: cell["clip"])
    values = {key: {clip: value for (clip, _), value in found.items()} for key, found in measured.items() if (key[0], key[2]) in wanted}
    for (suite, system, metric), clips in values.items():
        mean = float(np.mean([*clips.values()]))
        yield {"kind": "metric", "suite": suite, "system": system, "metric": metric, "mean": mean, "clips": clips}
    means = load_json_object(folder / "metrics/evaluate.json")
    for suite, metric in sorted(wanted):
        for system, found in means.get(suite, {}).items():
            if metric in found and (suite, system, metric) not in values:
                yield {"kind": "metric", "suite": suite, "system": system, "metric": metric, "mean": found[metric], "clips": {}}
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with (folder / "results/curves.csv").open() as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["suite"], row["system"], row["metric"]), []).append((float(row["second"]), float(row["mean"])))
    for (suite, system, metric), points in curves.items():
        seconds, values_over_time = zip(*sorted(points), strict=True)
        yield {"kind": "curve", "suite": suite, "system": system, "metric": metric, "seconds": seconds, "values": values_over_time}
        if metric == DRIFT:
            drift = {"suite": suite, "system": system, "metric": "drift", "mean": measure_drift(values_over_time), "clips": {}}
            yield {"kind": "metric", **drift}


def measure_drift(values: Sequence[float]) -> float:
    """Return the mean of the last third of a curve less that of its first third."""
    third = max(1, len(values) // 3)
    return float(np.mean(values[-third:]) - np.mean(values[:third]))


def cut_strips(plan: Plan, cell: Cell, samples: Path) -> Iterator[Row]:
    """Yield the first continued clip of each system as a strip of pictures, as a PNG in base64."""
    video = nodes.read_profile(plan.profile)["video"]
    for row in read_json_lines(samples / "index.jsonl"):
        if row["suite"] == "continuations" and Path(row["file"]).name.startswith("00000-"):
            frames = read_video(samples / row["file"], **video)
            picked = frames[np.linspace(0, len(frames) - 1, STRIP).astype(int)]
            file = io.BytesIO()
            Image.fromarray(np.concatenate(picked, axis=1)).save(file, "png", optimize=True)
            png = base64.b64encode(file.getvalue()).decode()
            yield {"kind": "strip", "system": row["system"], "prefix_share": row["prefix_frames"] / len(frames), "png": png}


class CommittedCell:
    """A cell as its file has it."""

    def __init__(self, file: Path) -> None:
        head, *rows = read_json_lines(file)
        self.about, self.rows = head, rows
        self.cell = Cell(head["world"], head["arm"], head["seed"], head["counted"])
        self.metrics = {(row["suite"], row["system"], row["metric"]): row for row in rows if row["kind"] == "metric"}

    def find_metric(self, suite: str, name: str, system: str = "student") -> Row | None:
        """Return the line of a metric, or None where no video had it."""
        return self.metrics.get((suite, system, name))


def read_cells(folder: Path) -> list[CommittedCell]:
    """Read all cells of a folder, which are those of one profile, in the order of their names."""
    return [CommittedCell(file) for file in sorted(folder.glob("*.jsonl"))]
