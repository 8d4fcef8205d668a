"""A DVC project shaped like ours, whose night takes seconds: same stages and options, students that are one number.

A clip is a text file that says `clip`; the more of them, the better a student can become, and each training brings it a quarter of the
way that is left. `stage2.damage` spoils the weights after training. What is measured is the student's number, a little different for
each prompt and seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.once import copy_of

ROOT = Path(__file__).parents[2]

IGNORED = ["data", "models", "samples", "results", "promoted", "inbox", "work", "runtime", ".runs", ".machine", "flows", "infra"]

DVC_YAML = """stages:
  clips:
    cmd: python -m tasks clips --out data/clips
    deps: ["${start.clips}", tasks/__main__.py]
    params: [clips]
    outs: [data/clips]
    metrics: [{metrics/clips.json: {cache: false}}]
  filter:
    cmd: python -m tasks filter --clips data/clips --out data/manifest.jsonl
    deps: [data/clips, tasks/__main__.py]
    outs: [data/manifest.jsonl]
    metrics: [{metrics/filter.json: {cache: false}}]
  codec:
    cmd: python -m tasks codec --manifest data/manifest.jsonl --out models/codec
    deps: [data/manifest.jsonl, tasks/__main__.py]
    outs: [models/codec]
    metrics: [{metrics/codec.json: {cache: false}}]
  encode:
    cmd: python -m tasks encode --clips data/clips --manifest data/manifest.jsonl --codec models/codec --out data/latents
    deps: [data/clips, data/manifest.jsonl, models/codec, tasks/__main__.py]
    outs: [data/latents]
    metrics: [{metrics/encode.json: {cache: false}}]
  stage1:
    cmd: python -m tasks stage1 --latents data/latents --out models/stage1
    deps: [data/latents, tasks/__main__.py]
    outs: [models/stage1]
    metrics: [{metrics/stage1.json: {cache: false}}]
  stage2:
    cmd: python -m tasks stage2 --latents data/latents --student ${start.stage2} --out models/stage2
    deps: [data/latents, "${start.stage2}", tasks/__main__.py]
    params: [stage2]
    outs: [models/stage2]
    metrics: [{metrics/stage2.json: {cache: false}}]
  generate:
    cmd: python -m tasks generate --codec models/codec --latents data/latents --stage2 models/stage2 --out samples
    deps: [models/codec, data/latents, models/stage2, tasks/__main__.py]
    params: [generate]
    outs: [samples]
    metrics: [{metrics/generate.json: {cache: false}}]
  evaluate:
    cmd: python -m tasks evaluate --samples samples --clips data/clips --out results
    deps: [samples, data/clips, tasks/__main__.py]
    outs: [results]
    metrics: [{metrics/evaluate.json: {cache: false}}]
"""

PARAMS = """profile: tiny
start: {clips: raw, stage2: models/stage1}
clips: {source: folder, folder: raw}
stage2: {damage: 0.0, seconds: 0.0}
generate:
  prompts: 3
  continued: 1
  prompts_file: null
  seeds: [0]
  systems: {stage2: {weights: stage2}}
  continuations: {stage2: {weights: stage2}}
nightly:
  cron: 0 2 * * *
  timezone: UTC
  branch: main
  inbox: inbox
  settle: 0.0
  weekly: sunday
  keep: [codec, stage1]
  prompts_file: null
  prompts: 4
  seeds: [0, 1]
  rules:
    - {metric: prompts.student.quality, better: higher, margin: 0.0, bound: 0.3}
    - {metric: prompts.student.noise, better: lower, margin: -0.05, bound: null}
  push_timeout: 60.0
  push_again_after: [0.5]
  absent_hours: 26.0
"""

TASKS = '''"""Our stages, as small as can be. Its own kept folder counts what each really worked out."""
import hashlib, json, os, pathlib, shutil, sys, time
import yaml
words = sys.argv[1:]
if words[:1] == ["validate"]:
    sys.exit(0)
stage, given = words[0], dict(zip(words[1::2], words[2::2]))
params = yaml.safe_load(pathlib.Path(given.get("--params", "params.yaml")).read_text())
path = {name.removeprefix("--"): pathlib.Path(value) for name, value in given.items()}
out = path["out"]
def read(file): return json.loads(file.read_text())
def write(file, what):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(what if isinstance(what, str) else json.dumps(what, sort_keys=True) + "\\n")
def worked(what):
    folder = pathlib.Path(os.environ["CF_KEPT"]) / stage; folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.md5(what).hexdigest()).touch()
metrics = {"ran": 1}
if stage == "clips":
    rows = []
    for file in sorted(pathlib.Path(params["clips"]["folder"]).rglob("*.mp4")):
        name = "clip-" + hashlib.sha256(file.name.encode()).hexdigest()[:12]
        write(out / (name + ".mp4"), ""); shutil.copyfile(file, out / (name + ".mp4")); rows.append({"id": name, "source": file.name})
    write(out / "clips.jsonl", "".join(json.dumps(row) + "\\n" for row in rows))
if stage == "filter":
    rows = [json.loads(line) for line in (path["clips"] / "clips.jsonl").read_text().splitlines()]
    for row in rows:
        data = (path["clips"] / (row["id"] + ".mp4")).read_bytes(); worked(data)
        row["kept"] = data.startswith(b"clip ")
    write(out, "".join(json.dumps(row) + "\\n" for row in rows))
    metrics = {"clips": len(rows), "kept": sum(row["kept"] for row in rows), "rejected_unreadable": sum(not row["kept"] for row in rows)}
    if not metrics["kept"]:
        sys.exit("no clip passes the filter")
if stage == "codec":
    write(out / "codec.json", {"kind": "linear"})
if stage == "encode":
    rows = [json.loads(line) for line in path["manifest"].read_text().splitlines()]
    write(out / "index.json", {"clips": [row["id"] for row in rows if row["kept"]]})
if stage in ("stage1", "stage2"):
    limit = 1 - 2 / (2 + len(read(path["latents"] / "index.json")["clips"]))
    if stage == "stage1":
        quality = 0.9 * limit
    else:
        for second in range(int(params["stage2"]["seconds"] * 10)):
            time.sleep(0.1); print(f"stage2: {second}", flush=True)
        quality = limit - 0.75 * (limit - read(path["student"] / "weights.json")["quality"]) - params["stage2"]["damage"]
    write(out / "weights.json", {"quality": round(quality, 6)}); write(out / "metrics.jsonl", ""); metrics = {"quality": round(quality, 6)}
if stage == "generate":
    rows, g = [], params["generate"]
    for suite, systems in (("prompts", g["systems"]), ("continuations", g["continuations"])):
        for name, system in systems.items():
            quality = read(path[system["weights"]] / "weights.json")["quality"]
            for number in range(g["prompts"]):
                for seed in g["seeds"]:
                    file = f"{suite}/{name}/{number}-{seed}.json"
                    off = int(hashlib.sha256(f"{number} {seed}".encode()).hexdigest(), 16) % 100 / 1e4
                    write(out / file, {"quality": quality + off})
                    rows.append({"suite": suite, "system": name, "prompt": f"prompt {number}", "seed": seed, "file": file})
    write(out / "index.jsonl", "".join(json.dumps(row) + "\\n" for row in rows))
if stage == "evaluate":
    values = {}
    for row in map(json.loads, (path["samples"] / "index.jsonl").read_text().splitlines()):
        values.setdefault(row["suite"], {}).setdefault(row["system"], []).append(read(path["samples"] / row["file"])["quality"])
    metrics = {suite: {name: {"quality": round(sum(v) / len(v), 6), "noise": round(max(v) - min(v), 6)} for name, v in systems.items()}
               for suite, systems in values.items()}
    write(out / "cells.json", values)
write(pathlib.Path("metrics") / f"{stage}.json", metrics)
'''


def make(folder: Path) -> Path:
    """The project, committed, with nothing made yet and an empty inbox beside it (`inbox` is in .gitignore)."""
    return copy_of("nights", write, folder)


def write(folder: Path) -> None:
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "params.yaml": PARAMS,
        # what flows reads of tasks (tasks/files, tasks/params/yaml_file) comes from the real package
        "tasks/__init__.py": f"__path__.append({str(ROOT / 'tasks')!r})\n",
        "tasks/__main__.py": TASKS,
        ".gitignore": "".join(f"/{name}\n" for name in IGNORED) + "__pycache__/\n",
        ".dvcignore": ".runs\n.machine\nwork\nruntime\ninbox\nflows\ninfra\n__pycache__\n*.partial\n",
        "inbox/.keep": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q", "-b", "main")
    dvc(folder, "init", "-q")
    for key, value in {"core.analytics": "false", "core.check_update": "false"}.items():
        dvc(folder, "config", "-q", key, value)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a project")


def clips(folder: Path, *names: str) -> None:
    """Good ones; a name that begins with `bad` is no video."""
    for name in names:
        bad = name.startswith("bad")
        (folder / "inbox" / f"{name}.mp4").write_bytes(os.urandom(300) if bad else f"clip {name}\n".encode() * 20)


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "CF_", "CUDA_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "PREFECT_LOGGING_COLORS": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **quiet, **more}


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    return ran(folder, "git", *names, *words)


def dvc(folder: Path, *words: str) -> str:
    return ran(folder, sys.executable, "-m", "dvc", *words)


def ran(folder: Path, *words: str, **more: str) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}"
    return done.stdout
