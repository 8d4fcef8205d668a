"""`cf compare`: two runs on one page that needs no other file: what differs, numbers with intervals, curves, videos.

A run is a folder, a Git revision or an experiment of DVC, of which the last two are checked out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cf_model.evaluate import figures
from cf_model.evaluate.figures import Line, average_rows, draw_chart, embed_video, wants_logarithm
from cf_model.evaluate.report import SUITES, describe_metric, render_page
from cf_model.evaluate.run_comparison import compare_suites, count_verdicts
from tasks.files.atomic import write_atomically
from tasks.files.dvc_config import read_public_config
from tasks.files.json_lines import Row, load_json_object, read_json_lines
from tasks.files.trees import list_nodes
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused
from tasks.report import read_curves, read_results

COLOURS = {"A": "#3f83c9", "B": "#e0813a"}
ABSENT = "–"
COMPARED_OUTS = ("results", "samples", "data/manifest.jsonl")  # outs that a comparison reads; of the models it reads only the curves
CURVE_FILE = "metrics.jsonl"
GIT, DVC = ("git",), (sys.executable, "-m", "dvc")
SHOWN_PROMPTS = {"prompts": 4, "continuations": 2}  # whose videos are shown
SUITE_BYTES = 3_000_000  # bytes of one suite's videos, of each run


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
    root = find_folder(name, scratch / letter)
    lock = root / "dvc.lock"
    described = run_program(GIT, "log", "-1", "--format=%h%x00%s%x00%cs", cwd=root, check=False)
    commit, subject, date = described.split("\0") if described else ("", "", "")
    label = root.resolve().name if Path(name).is_dir() else name
    stages = yaml_file.read_yaml(lock).get("stages", {}) if lock.exists() else {}
    return Side(letter, label, root, yaml_file.read_yaml(root / "params.yaml"), stages, commit, subject, date)


def build_page(a: Side, b: Side) -> dict[str, Any]:
    """Return the values of the page's template."""
    rules = a.params.get("evaluate") or {}
    resamples, seed = int(rules.get("resamples", 1000)), int(a.params.get("seed", 0))
    measured = [read_results(side.root / "results", side.root / "metrics", resamples=resamples, seed=seed) for side in (a, b)]
    suites = compare_suites(*measured)
    size = a.params.get("video") or {}
    return {
        "sides": [a, b],
        "colours": COLOURS,
        "params": list_changed_params(a.params, b.params),
        "stages": compare_stages(a.lock, b.lock),
        "suites": suites,
        "tally": count_verdicts(suites),
        "curves": draw_curves(a.root, b.root, COLOURS),
        "training": draw_training(a.root, b.root, COLOURS),
        "videos": embed_videos(a.root, b.root, suites, int(size.get("fps", 16))),
        "shape": (size.get("width", 1), size.get("height", 1)),
        "numbers": compare_stage_metrics(a.root, b.root),
        "resamples": resamples,
    }


def list_changed_params(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List every value that differs, by its dotted key, but for `tracking`, which changes no result."""
    one, other = (flatten_tree({key: value for key, value in params.items() if key != "tracking"}) for params in (a, b))
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return [(key, one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys]


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a tree by their dotted keys, as JSON; an empty section is a value."""
    return {key: json.dumps(value, ensure_ascii=False) for key, value in list_nodes(tree) if not (isinstance(value, Mapping) and value)}


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
        keys = sorted(key for key, _, _ in list_changed_params(*stated))
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


def draw_curves(a: Path, b: Path, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Draw results/curves.csv of both: for each system whose curves differ, a chart for each metric."""
    one, other = read_curves(a / "results/curves.csv"), read_curves(b / "results/curves.csv")
    systems: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in [key for key in one if key in other and str(one[key]) != str(other[key])]:
        curves = [Line(colours["A"], *one[key]), Line(colours["B"], *other[key])]
        systems.setdefault(key[:2], []).append({"title": describe_metric(key[2]).title, "svg": draw_chart(curves, x="seconds")})
    return [{"suite": SUITES.get(suite, suite), "system": name, "charts": charts} for (suite, name), charts in systems.items()]


def draw_training(a: Path, b: Path, colours: Mapping[str, str]) -> dict[str, Any]:
    """Draw running means of models/<stage>/metrics.jsonl of both; stages with equal rows are only named."""
    stages, same = [], []
    for name in dict.fromkeys(path.parent.name for root in (a, b) for path in sorted(root.glob("models/*/metrics.jsonl"))):
        one, other = (read_json_lines(root / "models" / name / "metrics.jsonl", missing_ok=True) for root in (a, b))
        if one == other:
            same.append(name)
            continue
        charts = []
        for key in dict.fromkeys(key for row in [*one, *other] for key in row if key != "step"):
            means = [draw_running_mean(colours[letter], rows, key) for letter, rows in (("A", one), ("B", other))]
            if drawn := [line for line in means if line]:
                log = wants_logarithm(np.concatenate([line.y for line in drawn]))
                charts.append({"title": key.replace("_", " "), "svg": draw_chart(drawn, x="step", log=log)})
        stages.append({"stage": name, "charts": charts})
    return {"stages": stages, "same": same}


def draw_running_mean(colour: str, rows: Sequence[Row], key: str) -> Line | None:
    """Return a value's running mean as a line; None for fewer than two numbers."""
    if (found := average_rows(rows, key)) is None:
        return None
    steps, _, mean = found
    return Line(colour, steps[-len(mean) :].tolist(), mean.tolist())


def embed_videos(a: Path, b: Path, measured: Sequence[Mapping[str, Any]], fps: int) -> list[dict[str, Any]]:
    """Embed, of each system that differs, the videos of A and B for the first prompts that both indices have, first seed."""
    index = [read_json_lines(root / "samples/index.jsonl", missing_ok=True) for root in (a, b)]
    suites = []
    for suite in SUITES:
        same = {one["name"] for part in measured if part["suite"] == suite for one in part["systems"] if one["same"]}
        items = [figures.group_by_item(rows, suite) for rows in index]
        shared = {key: {name: row for name, row in items[0][key].items() if name not in same} for key in items[0] if key in items[1]}
        rows = []
        for key in figures.fit_budget(shared, SHOWN_PROMPTS[suite], SUITE_BYTES, a / "samples"):
            pairs = [embed_pair(name, items[0][key][name], items[1][key].get(name), a, b, fps) for name in shared[key] if name != "real"]
            first, real = next(iter(items[0][key].values())), items[0][key].get("real")
            prefix = max(row["prefix_frames"] for row in items[0][key].values()) / fps
            facts = {"prompt": first["prompt"], "seed": first["seed"], "prefix": prefix, "pairs": [one for one in pairs if one]}
            rows.append(facts | {"real": embed_video(a / "samples" / real["file"]) if real else None})
        rows = [row for row in rows if row["pairs"]]
        if rows:
            suites.append({"title": SUITES[suite], "rows": rows, "of": len(shared), "same": sorted(same)})
    return suites


def embed_pair(name: str, one: Mapping[str, Any], other: Mapping[str, Any] | None, a: Path, b: Path, fps: int) -> dict[str, Any] | None:
    """Embed a system's videos of both runs with their frame strips; None unless both have the video with that seed."""
    if other is None or one["seed"] != other["seed"]:
        return None
    files = [root / "samples" / row["file"] for root, row in ((a, one), (b, other))]
    if not all(file.exists() for file in files):
        return None
    readable = [frames for file in files if (frames := figures.read_frames(file, round(figures.STRIP_SECONDS * fps))) is not None]
    strips = [figures.draw_strip(frames, figures.STRIP_HEIGHT) for frames in readable]
    return {"system": name, "sources": [embed_video(file) for file in files], "strips": strips}


def find_folder(name: str, into: Path) -> Path:
    """Return the folder of the run `name`; `into` is created, and returned, only for a revision or an experiment."""
    if (folder := Path(name)).is_dir():
        if not (folder / "params.yaml").exists():
            raise Refused(f"{name} is a folder without params.yaml; name the root of a run, a revision or an experiment")
        return folder
    sha = find_commit(name)
    if sha is None:
        raise Refused(f"{name} is neither a folder, nor a revision of this repository, nor an experiment (`dvc exp list --all-commits`)")
    return check_out_revision(sha, into)


def find_commit(name: str) -> str | None:
    """Return the commit of a branch, a tag or anything else Git can name, or of an experiment by its name in `dvc exp show`."""
    if name.startswith("-"):
        return None
    if sha := run_program(GIT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", check=False):
        return sha
    listed = run_program(GIT, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or ""
    refs = [line.split(" ", 1) for line in listed.splitlines()]
    return next((sha for sha, ref in refs if ref.split("/")[-1] == name and len(ref.split("/")) == 5), None)


def check_out_revision(sha: str, into: Path) -> Path:
    """Clone a revision into the folder `into`, with Git's objects and DVC's cache shared, and check out what a comparison reads.

    Not by `git worktree`, because a comparison that is killed would leave a registered worktree. The clone has this repository's
    remotes without their secrets, because that killed comparison would leave the folder too.
    """
    run_program(GIT, "clone", "--quiet", "--shared", "--no-checkout", run_program(GIT, "rev-parse", "--show-toplevel") or "", str(into))
    run_program(GIT, "checkout", "--quiet", "--detach", sha, cwd=into)
    if not (into / "dvc.lock").exists():
        return into
    with (into / ".dvc/config.local").open("w") as file:
        read_public_config(Path(".dvc/config.local")).write(file)
    run_program(DVC, "cache", "dir", "--local", run_program(DVC, "cache", "dir") or "", cwd=into)
    outs = [out["path"] for stage in yaml_file.read_yaml(into / "dvc.lock")["stages"].values() for out in stage.get("outs", [])]
    wanted = [path for path in outs if path in COMPARED_OUTS]
    wanted += [f"{path}/{CURVE_FILE}" for path in outs if path.startswith("models/")]
    wanted = [path for path in wanted if not (into / path).exists()]
    if wanted and run_program(DVC, "checkout", "--quiet", *wanted, cwd=into, check=False) is None:
        for path in wanted:  # one by one, because an absent out must not stop the others; the page says what is absent
            if run_program(DVC, "checkout", "--quiet", path, cwd=into, check=False) is None:
                run_program(DVC, "pull", "--quiet", path, cwd=into, check=False)
    return into


def run_program(program: Sequence[str], *words: str, cwd: Path | None = None, check: bool = True) -> str | None:
    """Run GIT or DVC in the folder `cwd` and return its output; after a failure raise Refused, or return None if not `check`."""
    done = subprocess.run([*program, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode and check:
        raise Refused(f"{program[-1]} {words[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return None if done.returncode else done.stdout.strip()
