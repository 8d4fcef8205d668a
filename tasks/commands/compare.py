"""`cf compare`: two runs on one page that needs no other file: what differs, numbers with intervals, curves, videos.

A run is a folder, a Git revision or an experiment of DVC, of which the last two are checked out. An --out that ends in .json gets the
compared numbers alone.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cf_model.evaluate import run_comparison
from cf_model.evaluate.report import render_page
from tasks.files.atomic import write_atomically
from tasks.files.dvc_config import read_public_config
from tasks.files.json_lines import read_json_lines
from tasks.files.options import parse_options
from tasks.files.trees import list_nodes
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused, refuse_errors
from tasks.report import read_curves, read_metrics, read_results, read_training

ABSENT = "–"
COMPARED_OUTS = ("results", "samples", "data/manifest.jsonl")  # outs that a comparison reads; of the models it reads only the curves
CURVE_FILE = "metrics.jsonl"
GIT, DVC = ("git",), (sys.executable, "-m", "dvc")


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
    args = parse_options("compare", argv, __doc__)
    with tempfile.TemporaryDirectory(prefix="cf-compare-") as scratch:
        a, b = (read_side(letter, name, Path(scratch)) for letter, name in (("A", args.a), ("B", args.b)))
        if args.out.suffix == ".json":
            rows = run_comparison.list_compared(measure_sides(a, b))
            text = json.dumps({"a": a.name, "b": b.name, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        else:
            text = render_page(build_page(a, b), Path(run_comparison.__file__).with_name("comparison.html.j2"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, text)
    print(f"{args.out}: {a.name} beside {b.name}, {len(text.encode()) / 1e6:.1f} MB")


def read_side(letter: str, name: str, scratch: Path) -> Side:
    """Find the run `name`, in a folder below `scratch` if it is a revision, and read what describes it."""
    root = find_folder(name, scratch / letter)
    lock = root / "dvc.lock"
    described = run_program(GIT, "log", "-1", "--format=%h%x00%s%x00%cs", cwd=root, check=False)
    commit, subject, date = described.split("\0") if described else ("", "", "")
    label = root.resolve().name if Path(name).is_dir() else name
    stages = yaml_file.read_yaml(lock).get("stages", {}) if lock.exists() else {}
    return Side(letter, label, root, yaml_file.read_yaml(root / "params.yaml"), stages, commit, subject, date)


def measure_sides(a: Side, b: Side) -> list[dict[str, Any]]:
    """Compare the cells of both runs (run_comparison.compare_suites); Refused where they measured a metric by different protocols."""
    rules: dict[str, Any] = {"resamples": count_resamples(a), "seed": int(a.params.get("seed", 0))}
    measured = [read_results(side.root / "results", side.root / "metrics", **rules) for side in (a, b)]
    with refuse_errors():
        return run_comparison.compare_suites(*measured)


def count_resamples(side: Side) -> int:
    """Return how many draws the intervals of a run are made of."""
    return int((side.params.get("evaluate") or {}).get("resamples", 1000))


def build_page(a: Side, b: Side) -> dict[str, Any]:
    """Return the values of the page's template."""
    suites = measure_sides(a, b)
    size, samples = a.params.get("video") or {}, [side.root / "samples" for side in (a, b)]
    index = [read_json_lines(folder / "index.jsonl", missing_ok=True) for folder in samples]
    return {
        "sides": [a, b],
        "colours": run_comparison.COLOURS,
        "params": list_changed_params(a.params, b.params),
        "stages": compare_stages(a.lock, b.lock),
        "suites": suites,
        "tally": run_comparison.count_verdicts(suites),
        "curves": run_comparison.draw_curves(*(read_curves(side.root / "results/curves.csv") for side in (a, b))),
        "training": run_comparison.draw_training(*(read_training(side.root / "models") for side in (a, b))),
        "videos": run_comparison.embed_videos(index, samples[0], samples[1], suites, int(size.get("fps", 16))),
        "shape": (size.get("width", 1), size.get("height", 1)),
        "numbers": run_comparison.compare_stage_metrics(*(read_metrics(side.root / "metrics") for side in (a, b))),
        "resamples": count_resamples(a),
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
