"""W&B's offline runs, written for real and read back for real, by W&B's own reader and in processes of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tasks.wandb_log import sync
from tests.once import copy_of

ROOT = Path(__file__).parents[1]

PIPELINE = """
stages:
  clips: {cmd: "true", outs: [data/clips]}
  encode: {cmd: "true", deps: [data/clips, tasks/encode.py], outs: [data/latents]}
  teacher: {cmd: "true", deps: [data/latents], outs: [models/teacher]}
  generate: {cmd: "true", deps: [models/teacher, data/latents], outs: [samples]}
  evaluate: {cmd: "true", deps: [samples], outs: [results]}
  report: {cmd: "true", deps: [results, models/teacher/metrics.jsonl], outs: [reports/report.html]}
"""
# one stage as tasks/runner/execute.py runs it; `body` is what happens between its start and its end
STAGE = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from tasks.params.project import Project
from tasks.runner import track as tracking
from tasks.runner.execute import execute
from tasks.wandb_log import run as mirror

stage, wandb = sys.argv[1], sys.argv[2]
project = Project()
project.tree = {"seed": 0, "profile": "tiny", "evaluate": {"resamples": 100}}
project.params = SimpleNamespace(seed=0, threads=1, watch=(), tracking=SimpleNamespace(wandb=wandb, project="toy"))

def run(params, track, *, out):
BODY
execute(stage, run, {"out": Path(sys.argv[3])}, project, began=time.time())
"""


def project(root: Path) -> Path:
    """Stages by name only, and data for the first; a Git repository with one commit."""
    return copy_of("stages-by-name", write, root)


def write(root: Path) -> None:
    (root / "data/clips/a b").mkdir(parents=True)
    (root / "data/clips/a b/ä.mp4").write_bytes(b"clip")
    (root / "data/clips/clips.jsonl").write_text("{}\n")
    (root / "tasks").mkdir()
    (root / "tasks/encode.py").write_text("")
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / ".gitignore").write_text("/data\n/models\n/samples\n/results\n/reports\n/runtime\n/work\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)


def environment(**more: str) -> dict[str, str]:
    names = ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_API_KEY", "CF_RUN", "DVC_EXP_NAME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PYTHONPATH": str(ROOT), "CF_RUN": "nightly-7", "WANDB_MODE": "offline"} | more


def stage(root: Path, name: str, out: str, body: str, wandb: str = "offline", **more: str) -> subprocess.CompletedProcess[str]:
    code = STAGE.replace("BODY", textwrap.indent(textwrap.dedent(body).strip(), "    "))
    command = [sys.executable, "-c", code, name, wandb, out]
    return subprocess.run(command, cwd=root, env=environment(**more), capture_output=True, text=True, timeout=120)


def runs(root: Path) -> list[sync.LocalRun]:
    return sync.list_runs(root)


def inspect(folder: str | Path, *words: str) -> str:
    """What W&B's reader prints of a run; it is asked again when the run's file has changed."""
    written = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(folder).glob("*.wandb"))]
    return _read(str(folder), words, tuple(written))


@functools.cache
def _read(folder: str, words: tuple[str, ...], written: tuple[Any, ...]) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *words, folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment()).stdout


def records(folder: str | Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in inspect(folder).splitlines() if line.strip()]
    return [row[kind] for row in rows if row["type"] == kind]


def described(folder: str | Path) -> dict[str, Any]:
    """What wandb.init was told."""
    (run,) = records(folder, "run")
    return run


def history(folder: str | Path) -> list[dict[str, Any]]:
    return [row["item"] for row in records(folder, "history")]


def summary(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(folder, "--summary"))
    return found
