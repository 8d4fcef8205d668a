"""Stage `report`: one HTML page with videos, frame strips, curves and tables.

It reads what the other stages wrote, and names what is absent.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cf_model.data.contact_sheet import draw_clips
from cf_model.data.filter import list_bounds
from cf_model.evaluate.cells import SUITES, expand_lines, group_values, list_protocols
from cf_model.evaluate.contents import Measured, Trained, build_contents, view_filter
from cf_model.evaluate.figures import item_key
from cf_model.evaluate.page import count_contents
from cf_model.evaluate.planes import list_plane_rows
from cf_model.evaluate.report import RECALL, Results, render_page
from cf_model.evaluate.rule_histograms import list_bins
from cf_model.metrics.totals import recompute_printed_total
from tasks.files.hashes import compute_dvc_md5
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


def read_cells(results: Path) -> list[Row]:
    """Read the cells of the stage evaluate; none if the file is absent."""
    file = results / "cells.jsonl"
    return expand_lines(read_json_lines(file, missing_ok=True), str(file))


def read_results(results: Path, metrics: Path, *, resamples: int, seed: int, cells: list[Row] | None = None) -> Results:
    """Read the stage evaluate's cells, unless they are given, and its means; absent files give empty results."""
    cells = read_cells(results) if cells is None else cells
    means = load_json_object(metrics / "evaluate.json", missing_ok=True)
    means = {suite: systems for suite, systems in means.items() if suite in (*SUITES, RECALL)}
    return Results(group_values(cells, item_key), means, resamples, seed, list_protocols(cells))


def hash_origins(paths: Iterable[Path]) -> dict[str, str]:
    """Return DVC's md5 of each path that is there."""
    return {path.name: compute_dvc_md5(path) for path in paths if path.exists()}


def write_table(path: Path, rows: list[list[Any]]) -> None:
    """Write rows as a CSV file, for `dvc plots`."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_measured(results: Path, metrics: Path, *, resamples: int, seed: int) -> Measured:
    """Read all that was measured of the videos; absent files give empty results."""
    cells = read_cells(results)
    values = read_results(results, metrics, resamples=resamples, seed=seed, cells=cells)
    return Measured(
        values,
        read_curves(results / "curves.csv"),
        failures=[cell | event for cell in cells for event in cell.get("events", ())],
        unscored=[cell["failed"] for cell in cells if cell.get("failed")],
        protocols={cell["protocol"] for cell in cells if cell.get("protocol")},
        seconds={cell["system"]: cell["frames"] / cell["fps"] for cell in cells if cell.get("suite") == "prompts" and "frames" in cell},
        weights={str(cell["weights"]) for cell in cells if cell.get("weights")},
    )


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
    """Write the folder of the report: report.html, one page with videos, strips, curves and tables that needs no other file, and the
    tables rules.csv and plane.csv for `dvc plots`.

    `data` is the manifest; `clips`, if given, is the folder of the clips and says which bad ones were planted. Run, commit, times and
    hardware are not in the page itself: it loads ../runtime/runtime.js where there is one.
    """
    index, manifest = read_json_lines(samples / "index.jsonl", missing_ok=True), read_json_lines(data, missing_ok=True)
    bounds = list_bounds(params.filter)
    filtered = view_filter(manifest, bounds)
    if clips:
        wanted = filtered.list_wanted(manifest)
        spec = params.filter
        filtered.pictures.update(draw_clips(wanted, clips, fps=params.video.fps, workers=spec.workers, timeout=spec.timeout))
    trained = Trained(
        manifest,
        read_json_lines(clips / "clips.jsonl", missing_ok=True) if clips else [],
        read_training(models),
        read_metrics(metrics),
        hash_origins([*sorted(models.glob("*")), samples, results, data]),
    )
    measured = read_measured(results, metrics, resamples=params.evaluate.resamples, seed=params.seed)
    stated = {"prompts": params.generate.systems, "continuations": params.generate.continuations}
    recipes = {suite: {name: as_trained(params, system) for name, system in systems.items()} for suite, systems in stated.items()}
    contents = build_contents(params, recipes, measured, trained, filtered, samples, index, recompute_printed_total)
    # Where a run is tracked changes no result, so it must not change the page.
    shown = params.model_dump(mode="json", exclude={"tracking", "nightly"})
    html = render_page(contents | {"yaml": yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)})
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(html, encoding="utf-8")
    write_table(out / "rules.csv", list_bins(manifest, bounds))
    write_table(out / "plane.csv", list_plane_rows(contents["planes"]))
    return count_contents(html) | {"troubles": {stage: len(sentences) for stage, sentences in contents["troubles"].items()}}
