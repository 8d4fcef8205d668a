"""`cf compare`: two runs on one page that needs no other file: what differs, numbers with intervals, curves, videos."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cf_model.evaluate.report import render_page
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import load_json_object
from tasks.params import yaml_file
from tasks.report import read_results

from . import results, revision

COLOURS = {"A": "#3f83c9", "B": "#e0813a"}
ABSENT = "–"


@dataclass(frozen=True)
class Side:
    """A run to compare: its folder, and its parameters, dvc.lock and commit."""

    letter: str
    name: str
    root: Path
    params: Mapping[str, Any]
    lock: Mapping[str, Any]
    commit: str
    subject: str
    date: str


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf compare", description=__doc__)
    parser.add_argument("a", help="a folder (the root of a run; . is this one), a Git revision, or an experiment of DVC")
    parser.add_argument("b", help="the same; differences are B minus A")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="default: compare.html")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cf-compare-") as scratch:
        a, b = (read_side(letter, name, Path(scratch)) for letter, name in (("A", args.a), ("B", args.b)))
        html = render_page(build_page(a, b), Path(__file__).with_name("page.html.j2"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, html)
    print(f"{args.out}: {a.name} beside {b.name}, {len(html.encode()) / 1e6:.1f} MB")


def read_side(letter: str, name: str, scratch: Path) -> Side:
    """Find the run `name`, in a folder below `scratch` if it is a revision, and read what describes it."""
    root = revision.find_folder(name, scratch / letter)
    lock = root / "dvc.lock"
    described = revision.run_program(revision.GIT, "log", "-1", "--format=%h%x00%s%x00%cs", cwd=root, check=False)
    commit, subject, date = described.split("\0") if described else ("", "", "")
    label = root.resolve().name if Path(name).is_dir() else name
    stages = yaml_file.read_yaml(lock).get("stages", {}) if lock.exists() else {}
    return Side(letter, label, root, yaml_file.read_yaml(root / "params.yaml"), stages, commit, subject, date)


def build_page(a: Side, b: Side) -> dict[str, Any]:
    """Return the values of the page's template."""
    rules = a.params.get("evaluate") or {}
    resamples, seed = int(rules.get("resamples", 1000)), int(a.params.get("seed", 0))
    measured = [read_results(side.root / "results", side.root / "metrics", resamples=resamples, seed=seed) for side in (a, b)]
    suites = results.compare_suites(*measured)
    size = a.params.get("video") or {}
    return {
        "sides": [a, b],
        "colours": COLOURS,
        "params": list_changed_params(a.params, b.params),
        "stages": compare_stages(a.lock, b.lock),
        "suites": suites,
        "tally": results.count_verdicts(suites),
        "curves": results.draw_curves(a.root, b.root, COLOURS),
        "training": results.draw_training(a.root, b.root, COLOURS),
        "videos": results.embed_videos(a.root, b.root, suites, int(size.get("fps", 16))),
        "shape": (size.get("width", 1), size.get("height", 1)),
        "numbers": compare_stage_metrics(a.root, b.root),
        "resamples": resamples,
    }


def list_changed_params(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List every value that differs, by its dotted key, but for `tracking`, which changes no result."""
    one, other = (dict(flatten_tree({key: value for key, value in params.items() if key != "tracking"})) for params in (a, b))
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return [(key, one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys]


def flatten_tree(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a tree as (dotted key, value as JSON)."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flatten_tree(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, ensure_ascii=False)


def compare_stages(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each stage in dvc.lock whether both made the same bytes, and which code, data and parameters differ."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if one is None or other is None:
            rows.append({"stage": name, "same": None, "absent": "A" if one is None else "B", "code": [], "data": [], "params": []})
            continue
        deps = list_changed_entries(one, other, "deps")
        stated = ({key: value for file in entry.get("params", {}).values() for key, value in file.items()} for entry in (one, other))
        params = [dict(flatten_tree(tree)) for tree in stated]
        keys = sorted(key for key in {*params[0], *params[1]} if params[0].get(key) != params[1].get(key) and "tracking" not in key)
        code = [path for path in deps if path.startswith(("cf_model/", "tasks/"))]
        same = not list_changed_entries(one, other, "outs")
        rows.append({"stage": name, "same": same, "code": code, "data": [path for path in deps if path not in code], "params": keys})
    return rows


def list_changed_entries(one: Mapping[str, Any], other: Mapping[str, Any], kind: str) -> list[str]:
    """List the paths whose md5 differs between two entries of dvc.lock; `kind`: deps or outs."""
    first, second = ({entry["path"]: entry.get("md5") for entry in lock.get(kind, [])} for lock in (one, other))
    return sorted(path for path in {*first, *second} if first.get(path) != second.get(path))


def compare_stage_metrics(a: Path, b: Path) -> list[dict[str, Any]]:
    """List the values of metrics/<stage>.json that differ; those of `evaluate` have tables of their own."""
    rows = []
    names = dict.fromkeys(path.stem for root in (a, b) for path in sorted((root / "metrics").glob("*.json")))
    for name in names:
        if name in ("evaluate", "report"):
            continue
        one, other = (load_json_object(root / "metrics" / f"{name}.json", missing_ok=True) for root in (a, b))
        for key in dict.fromkeys([*one, *other]):
            x, y = one.get(key), other.get(key)
            if x != y:
                change = y - x if isinstance(x, int | float) and isinstance(y, int | float) else None
                rows.append({"stage": name, "key": key.replace("_", " "), "a": x, "b": y, "change": change})
    return rows
