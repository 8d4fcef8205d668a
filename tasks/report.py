"""Stage `report`: one HTML page with videos, frame strips, curves and tables.

It reads what the other stages wrote, and names what is absent.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cf_model.data.filter import list_bounds
from cf_model.evaluate import figures, page
from cf_model.evaluate import report as tables
from cf_model.evaluate.cells import SUITES, expand_lines, group_values, list_protocols
from cf_model.evaluate.report import Results
from cf_model.evaluate.rule_histograms import describe_rules
from tasks.files.json_lines import Row, load_json_object, read_json_lines
from tasks.params.schema import Params
from tasks.parts.systems import as_trained
from tasks.runner.track import Track


def read_curves(path: Path) -> dict[tuple[str, str, str], Any]:
    """Read results/curves.csv as (suite, system, metric) -> lists of second, mean, low and high; what was not measured is NaN."""
    rows: dict[tuple[str, str, str], list[list[float]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                values = [float(row[name]) if row[name] else float("nan") for name in ("second", "mean", "low", "high")]
                rows.setdefault((row["suite"], row["system"], row["metric"]), []).append(values)
    return {key: np.array(sorted(some)).T.tolist() for key, some in rows.items()}


def read_training(models: Path) -> dict[str, list[Row]]:
    """Read the rows that each training stage logged, by stage."""
    return {path.parent.name: read_json_lines(path) for path in sorted(models.glob("*/metrics.jsonl"))}


def read_metrics(folder: Path) -> dict[str, Row]:
    """Read metrics/*.json by stage, without the report's own file, which would be that of the run before."""
    return {path.stem: load_json_object(path) for path in sorted(folder.glob("*.json")) if path.stem != "report"}


def read_results(results: Path, metrics: Path, *, resamples: int, seed: int) -> Results:
    """Read the stage evaluate's cells and means; absent files give empty results."""
    file = results / "cells.jsonl"
    cells = expand_lines(read_json_lines(file, missing_ok=True), str(file))
    means = load_json_object(metrics / "evaluate.json", missing_ok=True)
    means = {suite: systems for suite, systems in means.items() if suite in SUITES}
    return Results(group_values(cells, figures.item_key), means, resamples, seed, list_protocols(cells))


def run(
    params: Params,
    track: Track,
    *,
    results: Path,
    samples: Path,
    metrics: Path,
    models: Path,
    data: Path,
    out: Path,
    clips: Path | None = None,
) -> dict[str, Any]:
    """Write the report: one HTML page with videos, frame strips, curves and tables that needs no other file.

    `data` is the manifest; `clips`, if given, says which bad clips were planted. Times and hardware are not in the page
    itself: it loads ../runtime/runtime.js where there is one.
    """
    index = read_json_lines(samples / "index.jsonl", missing_ok=True)
    values = read_results(results, metrics, resamples=params.evaluate.resamples, seed=params.seed)
    stated = {"prompts": params.generate.systems, "continuations": params.generate.continuations}
    recipes = {suite: {name: as_trained(params, system) for name, system in systems.items()} for suite, systems in stated.items()}
    present = {suite: page.systems_of(suite, systems, index, values) for suite, systems in recipes.items()}
    colours = page.choose_colours(present["prompts"] + present["continuations"])
    roles = {suite: page.by_weights(systems, present[suite]) for suite, systems in recipes.items()}
    stages = {weights: {suite: role[weights] for suite, role in roles.items() if weights in role} for weights in ("stage1", "stage2")}
    student = next((roles["prompts"][w] for w in ("stage2", "stage1", "causal_init", "base") if w in roles["prompts"]), None)
    galleries = {suite: figures.build_gallery(suite, index, present[suite], samples, params.video.fps) for suite in SUITES}
    teachers = [name for name in present["continuations"] if (s := recipes["continuations"].get(name)) and s.weights == "teacher"]
    kinds = {page.name_memory(recipes["continuations"][name]): name for name in reversed(teachers)}
    manifest = read_json_lines(data, missing_ok=True)
    made = read_json_lines(clips / "clips.jsonl", missing_ok=True) if clips else []
    training = read_training(models)
    troubles = page.list_troubles(training, params.watch)
    contents = {
        "params": params,
        "troubles": troubles,
        "facts": page.list_facts(params, index, manifest, [row for gallery in galleries.values() for row in gallery["rows"]]),
        "colours": colours,
        "recipes": {suite: {name: page.describe_system(system) for name, system in systems.items()} for suite, systems in recipes.items()},
        "claim": page.build_claim(values, index, stages, kinds.get("slow-fast"), made, samples),
        "goals": tables.check_goals(values, roles["prompts"], kinds),
        "student": student,
        "guesses": figures.build_guesses(index, student, samples, choices=params.evaluate.choices, seed=params.seed),
        "machine": {key: value for key, value in values.means.get("prompts", {}).get(student or "", {}).items() if "guess" in key},
        "galleries": galleries,
        "suites": page.build_suites(values, present, page.draw_curves(read_curves(results / "curves.csv"), colours)),
        "compared": tables.compare_stages(values, stages["stage1"], stages["stage2"]),
        "pairs": {suite: (name, stages["stage2"][suite]) for suite, name in stages["stage1"].items() if suite in stages["stage2"]},
        "every": figures.STRIP_SECONDS,
        "teachers": tables.compare_memories(values, sorted(teachers, key=lambda name: name != kinds.get("slow-fast"))),
        "training": page.draw_training(training),
        "pipeline": page.list_stages(read_metrics(metrics)),
        "filter": page.summarise_filter(manifest, made) | {"rules": describe_rules(manifest, list_bounds(params.filter))},
        # Where a run is tracked changes no result, so it must not change the page.
        "yaml": yaml.safe_dump(params.model_dump(mode="json", exclude={"tracking", "nightly"}), sort_keys=False, allow_unicode=True),
    }
    html = tables.render_page(contents)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return page.count_contents(html) | {"troubles": {stage: len(sentences) for stage, sentences in troubles.items()}}
