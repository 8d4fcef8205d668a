"""Stage `report`: one HTML page with videos, frame strips, curves and tables.

It reads what the other stages wrote, and names what is absent.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cf_model.evaluate import figures
from cf_model.evaluate import report as tables
from cf_model.evaluate.report import SUITES, Results
from cf_model.evaluate.trouble import find_troubles
from tasks.files.json_lines import Row, load_json_object, read_json_lines
from tasks.params.schema import Params, System
from tasks.parts.systems import as_trained
from tasks.runner.track import Track

STAGES = {
    "validate": "checks every value of params.yaml",
    "clips": "renders worlds to video files, bad ones among them",
    "filter": "keeps clips longer than 10 s that pass the quality rules",
    "codec": "fits the codec: 4 frames to 1 latent, 8x in space",
    "encode": "clips to latents, captions to embeddings",
    "prompts": "the students' prompts, each once: captions, or a file",
    "base": "bidirectional model by flow matching",
    "teacher": "context teacher by error-recycling fine-tuning (sec. 3.4)",
    "causal_init": "few-step causal student, by teacher forcing or ODE regression",
    "stage1": "distribution matching on 21 latent frames (sec. 3.1)",
    "stage2": "contextual distribution matching with slow-fast memory (sec. 3.2, 3.3)",
    "generate": "videos of every system, prompt and seed",
    "evaluate": "metrics of the known world",
}


def read_curves(path: Path) -> dict[tuple[str, str, str], Any]:
    """Read results/curves.csv as (suite, system, metric) -> lists of second, mean, low and high; what was not measured is NaN."""
    rows: dict[tuple[str, str, str], list[list[float]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                values = [float(row[name]) if row[name] else float("nan") for name in ("second", "mean", "low", "high")]
                rows.setdefault((row["suite"], row["system"], row["metric"]), []).append(values)
    return {key: np.array(sorted(some)).T.tolist() for key, some in rows.items()}


def draw_curves(path: Path, colours: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Draw the charts of results/curves.csv by suite: a metric against time, with a line for each system."""
    lines: dict[tuple[str, str], list[figures.Line]] = {}
    for (suite, system, metric), columns in read_curves(path).items():
        lines.setdefault((suite, metric), []).append(figures.Line(colours.get(system, figures.GREY), *columns))
    charts: dict[str, list[dict[str, Any]]] = {}
    for (suite, metric), drawn in lines.items():
        charts.setdefault(suite, []).append({"word": tables.describe_metric(metric), "svg": figures.draw_chart(drawn, x="seconds")})
    return charts


def draw_training(models: Path) -> list[dict[str, Any]]:
    """Draw every value of models/<stage>/metrics.jsonl: faint as logged, and its running mean over a twentieth of the rows."""
    stages = []
    for path in sorted(models.glob("*/metrics.jsonl"), key=lambda path: stage_order(path.parent.name)):
        rows, charts = read_json_lines(path, missing_ok=True), []
        for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
            if found := figures.average_rows(rows, name):
                x, y, mean = found
                line, colour = figures.Line, figures.PALETTE[0]
                both = [line(colour, x.tolist(), y.tolist(), faint=True), line(colour, x[-len(mean) :].tolist(), mean.tolist())]
                svg = figures.draw_chart(both, x="step", log=figures.wants_logarithm(y))
                charts.append({"name": name.replace("_", " "), "last": float(mean[-1]), "svg": svg})
        stages.append({"stage": path.parent.name, "charts": charts, "steps": rows[-1]["step"] if rows else 0})
    return stages


def collect_troubles(models: Path, params: Params) -> dict[str, list[str]]:
    """Return the sentences about curves that left the bounds of params.yaml's section watch, by stage."""
    found = {stage: find_troubles(read_json_lines(models / stage / "metrics.jsonl", missing_ok=True), params.watch) for stage in STAGES}
    return {stage: sentences for stage, sentences in found.items() if sentences}


def stage_order(name: str) -> tuple[int, str]:
    """Return the sort key that brings stages into running order, unknown names last."""
    return (list(STAGES).index(name) if name in STAGES else len(STAGES), name)


def list_stages(metrics: Path) -> list[dict[str, Any]]:
    """List metrics/*.json by stage, without this stage's own file, which would be that of the run before."""
    names = sorted((path.stem for path in metrics.glob("*.json") if path.stem != "report"), key=stage_order)
    rows = []
    for name in dict.fromkeys([*STAGES, *names]):
        path = metrics / f"{name}.json"
        values = load_json_object(path, missing_ok=True)
        scalars = {key: value for key, value in values.items() if isinstance(value, int | float)}
        nested = len(values) > len(scalars)  # evaluate's: they have tables of their own
        rows.append({"stage": name, "does": STAGES.get(name, ""), "values": scalars, "absent": not path.exists(), "nested": nested})
    return rows


def summarise_filter(manifest: Sequence[Row], clips: Path | None) -> dict[str, Any]:
    """Summarise what the filter rejected and, where bad clips were planted, whether the filter was right."""
    planted = {row["id"]: row["planted"] for row in read_json_lines(clips / "clips.jsonl", missing_ok=True)} if clips else {}
    rejected = [row | {"planted": planted.get(row["id"])} for row in manifest if not row["kept"]]
    return {
        "clips": len(manifest),
        "kept": sum(row["kept"] for row in manifest),
        "heldout": sum(row["split"] == "heldout" for row in manifest),
        "rejected": rejected,
        "reasons": Counter(row["reason"] for row in rejected).most_common(),
        "known": bool(planted),
        "missed": [row["id"] for row in manifest if row["kept"] and planted.get(row["id"])],
        "lost": [row["id"] for row in rejected if not row["planted"]],
        "planted": sum(bool(kind) for kind in planted.values()),
    }


def describe_system(system: System) -> str:
    """Describe a system in words: its weights, and what they see of the past."""
    if memory := system.memory:
        never = memory.promote == "none" or (memory.promote == "similarity" and memory.tau <= -1)
        slow = "slow 0, as nothing is promoted" if never else f"slow {memory.slow}"
        return f"{system.weights}, memory: sink {memory.sink}, {slow}, fast {memory.fast}"
    if view := system.view:
        frames = f"sink {view.sink}, slow {view.slow}{f' (every {view.stride}th)' if view.slow else ''}, fast {view.fast}"
        held = f"what a memory of sink {view.sink}, slow {view.slow}, fast {view.fast} holds if each tested chunk is kept"
        contexts = {"none": "nothing", "contiguous": f"the last {view.sink + view.slow + view.fast}", "sparse": frames, "memory": held}
        context = contexts[view.context]
        return f"{system.weights}, bidirectional, sees of the past: {context}"
    return system.weights


def name_memory(system: System) -> str:
    """Name what a teacher sees of the past, for `check_goals`, which compares two such systems."""
    past = system.memory or system.view
    if past is None or (system.view and system.view.context == "none"):
        return "none"
    if past.slow == 0:
        return "fast only"
    return "contiguous" if system.view and system.view.context == "contiguous" else "slow-fast"


def by_weights(systems: Mapping[str, System], present: Iterable[str]) -> dict[str, str]:
    """Return weights -> the system that stands for them: the system of that name, or the first."""
    representatives: dict[str, str] = {}
    here = [name for name in systems if name in set(present)]
    for name in sorted(here, key=lambda name: name != systems[name].weights):
        representatives.setdefault(systems[name].weights, name)
    return representatives


def read_results(results: Path, metrics: Path, *, resamples: int, seed: int) -> Results:
    """Read the stage evaluate's cells and means; absent files give empty results."""
    cells: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for row in read_json_lines(results / "cells.jsonl", missing_ok=True):
        if row["value"] is not None:
            cells.setdefault((row["suite"], row["system"], row["metric"]), {})[figures.item_key(row), row["seed"]] = row["value"]
    means = load_json_object(metrics / "evaluate.json", missing_ok=True)
    return Results(cells, {suite: systems for suite, systems in means.items() if suite in SUITES}, resamples, seed)


def list_facts(params: Params, index: Sequence[Row], manifest: Sequence[Row], gallery_rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List the facts at the top of the page as (name, value)."""
    prompts = [row for row in index if row["suite"] == "prompts" and row["system"] != "real"]
    prefixes = [row for row in index if row["suite"] == "continuations"]
    context, trained = params.stage2.teacher.context, params.teacher.view.context
    meant = f"{context}, though it was trained on {trained} (stage2.teacher.mismatch: accept)"
    mismatch = [("context shown to the teacher", meant)] if context not in ("none", trained) else []
    return [
        ("profile", params.profile),
        ("prompts", str(len({figures.item_key(row) for row in prompts}))),
        ("seeds a prompt", str(len({row["seed"] for row in prompts}))),
        ("longest video", f"{max((tile['seconds'] or 0 for row in gallery_rows for tile in row['tiles']), default=0):.1f} s"),
        ("real prefixes continued", str(len({figures.item_key(row) for row in prefixes}))),
        ("videos in all", str(len(index))),
        ("clips kept to train on", str(sum(row["split"] == "train" for row in manifest))),
        ("size and rate", f"{params.video.width} × {params.video.height}, {params.video.fps} fps"),
        *mismatch,
    ]


def build_claim(
    values: Results, index: Sequence[Row], stages: Mapping[str, Mapping[str, str]], teacher: str | None, clips: Path | None, samples: Path
) -> dict[str, Any]:
    """Return what the page begins with: the worlds as teacher, stage 1 and stage 2 remember them, and stage 2 against stage 1."""
    truths = {row["id"]: row.get("truth") for row in read_json_lines(clips / "clips.jsonl", missing_ok=True)} if clips else {}
    names = {"teacher": teacher, "stage 1": stages["stage1"].get("continuations"), "stage 2": stages["stage2"].get("continuations")}
    shown = {title: name for title, name in names.items() if name}
    rows = tables.state_claim(values, names["stage 1"], names["stage 2"], teacher) if names["stage 1"] and names["stage 2"] else []
    return {"worlds": figures.draw_memories(index, shown, truths, samples) if shown else [], "rows": rows}


def systems_of(suite: str, stated: Mapping[str, System], index: Sequence[Row], results: Results) -> list[str]:
    """Return a suite's systems that have a video or a number, in the order of params.yaml, real last."""
    present = {row["system"] for row in index if row["suite"] == suite}
    present |= {system for s, system, _ in results.cells if s == suite} | set(results.means.get(suite, {}))
    return [name for name in [*stated, *sorted(present - {*stated, "real"}), "real"] if name in present]


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
    present = {suite: systems_of(suite, systems, index, values) for suite, systems in recipes.items()}
    names = [name for name in dict.fromkeys(present["prompts"] + present["continuations"]) if name != "real"]
    colours = {name: figures.PALETTE[k % len(figures.PALETTE)] for k, name in enumerate(names)} | {"real": figures.GREY}
    roles = {suite: by_weights(systems, present[suite]) for suite, systems in recipes.items()}
    stages = {weights: {suite: role[weights] for suite, role in roles.items() if weights in role} for weights in ("stage1", "stage2")}
    student = next((roles["prompts"][w] for w in ("stage2", "stage1", "causal_init", "base") if w in roles["prompts"]), None)
    galleries = {suite: figures.build_gallery(suite, index, present[suite], samples, params.video.fps) for suite in SUITES}
    teachers = [name for name in present["continuations"] if (s := recipes["continuations"].get(name)) and s.weights == "teacher"]
    kinds = {name_memory(recipes["continuations"][name]): name for name in reversed(teachers)}
    manifest = read_json_lines(data, missing_ok=True)
    troubles = collect_troubles(models, params)
    page = {
        "params": params,
        "troubles": troubles,
        "facts": list_facts(params, index, manifest, [row for gallery in galleries.values() for row in gallery["rows"]]),
        "colours": colours,
        "recipes": {suite: {name: describe_system(system) for name, system in systems.items()} for suite, systems in recipes.items()},
        "claim": build_claim(values, index, stages, kinds.get("slow-fast"), clips, samples),
        "goals": tables.check_goals(values, roles["prompts"], kinds),
        "student": student,
        "guesses": figures.build_guesses(index, student, samples, choices=params.evaluate.choices, seed=params.seed),
        "machine": {key: value for key, value in values.means.get("prompts", {}).get(student or "", {}).items() if "guess" in key},
        "galleries": galleries,
        "suites": build_suites(values, present, draw_curves(results / "curves.csv", colours)),
        "compared": tables.compare_stages(values, stages["stage1"], stages["stage2"]),
        "pairs": {suite: (name, stages["stage2"][suite]) for suite, name in stages["stage1"].items() if suite in stages["stage2"]},
        "every": figures.STRIP_SECONDS,
        "teachers": tables.compare_memories(values, sorted(teachers, key=lambda name: name != kinds.get("slow-fast"))),
        "training": draw_training(models),
        "pipeline": list_stages(metrics),
        "filter": summarise_filter(manifest, clips),
        # Where a run is tracked changes no result, so it must not change the page.
        "yaml": yaml.safe_dump(params.model_dump(mode="json", exclude={"tracking", "nightly"}), sort_keys=False, allow_unicode=True),
    }
    html = tables.render_page(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return count_contents(html) | {"troubles": {stage: len(sentences) for stage, sentences in troubles.items()}}


def build_suites(values: Results, present: Mapping[str, list[str]], charts: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each suite's title, systems, tables and charts, for the page."""
    return [
        {"title": title, "systems": present[s], "tables": tables.build_tables(values, s, present[s]), "charts": charts.get(s, [])}
        for s, title in SUITES.items()
    ]


def count_contents(html: str) -> dict[str, float]:
    """Count the videos, film strips and bytes of a page."""
    return {"videos": html.count("data:video/mp4"), "strips": html.count("data:image/png"), "bytes": len(html.encode())}
