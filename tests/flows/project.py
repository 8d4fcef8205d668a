"""A DVC project of four stages that takes seconds, for the tests of everything that runs one.

prepare -> slow     talks all the time and says how far it is; asks for a GPU
        -> stubborn ignores SIGTERM, and so does a child in a session of its own
        -> last     needs both; fails when params.yaml says so; writes the report

`cf validate` and `cf profile use` are there in small. What a process did is in `trace/`: `begin(folder)` gives a fresh one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.once import copy_of
from tests.preloaded import python_folder

ROOT = Path(__file__).parents[2]
STAGES = ["prepare", "slow", "stubborn", "last"]

DVC_YAML = """stages:
  prepare:
    desc: the first
    cmd: python work.py prepare
    deps: [raw.txt, work.py]
    params: [seed]
    outs: [data]
    meta: {cf: {gpus: 0, retries: 0, timeout: 60}}
  slow:
    cmd: python work.py slow
    deps: [data, work.py]
    params: [slow]
    outs: [models/slow]
    metrics:
      - metrics/slow.json:
          cache: false
    meta: {cf: {gpus: 1, retries: 0, timeout: 600}}
  stubborn:
    cmd: python work.py stubborn
    deps: [data, work.py]
    params: [stubborn]
    outs: [models/stubborn]
    meta: {cf: {retries: 1}}
  last:
    cmd: python work.py last
    deps: [models/slow, models/stubborn, work.py]
    params: [last]
    outs: [reports/report.html]
    metrics:
      - metrics/last.json:
          cache: false
"""

PARAMS = """# a comment that stays
profile: {profile}
seed: 1
slow: {{seconds: {seconds}, rate: 2.0e-6}}
stubborn:
  seconds: {seconds}
last: {{fail: false, times: 1}}
"""

WORK = """import json, os, pathlib, signal, subprocess, sys, time
from ruamel.yaml import YAML
stage = sys.argv[1]
params = YAML(typ="safe", pure=True).load(pathlib.Path("params.yaml"))
def note(name):
    trace = pathlib.Path(os.environ.get("TRACE", "trace")); trace.mkdir(exist_ok=True)
    (trace / f"{name}-{os.getpid()}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
def write(path, text):
    path = pathlib.Path(path); path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
note(stage)
if stage == "prepare":
    write("data/rows.txt", pathlib.Path("raw.txt").read_text() * 3)
if stage == "slow":
    steps = int(params["slow"]["seconds"] * 10)
    for step in range(1, steps + 1):
        time.sleep(0.1)
        print(f"slow: {step} of {steps} steps, loss {1 / step:.3f}", flush=True)
    write("models/slow/weights", "w" * 100)
    write("metrics/slow.json", json.dumps({"loss": 0.5, "of": {"a": 1, "b": 2.25}}))
    write("runtime/slow.json", json.dumps({"wandb": "runtime/wandb/offline-run-1"}))
if stage == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seconds = float(params["stubborn"]["seconds"])
    child = ("import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
             "t = pathlib.Path(os.environ.get('TRACE', 'trace')); (t / f'child-{os.getpid()}').write_text(''); "
             "time.sleep(float(sys.argv[1]))")
    held = subprocess.Popen([sys.executable, "-c", child, str(seconds)], start_new_session=True, stdout=subprocess.DEVNULL)
    held.wait()
    write("models/stubborn/weights", "s" * 100)
if stage == "last":
    print("Traceback: as it were", flush=True)
    if params["last"]["fail"]:
        sys.exit("last: it was told to fail")
    write("reports/report.html", "<p>report</p>")
    write("metrics/last.json", json.dumps({"score": params["last"]["times"]}))
"""

TASKS = '''"""cf, as small as can be."""
import pathlib, sys
words = sys.argv[1:]
params = pathlib.Path("params.yaml")
if words[:2] == ["profile", "use"]:
    file = pathlib.Path("profiles") / f"{words[2]}.yaml"
    if not file.exists():
        sys.exit(f"cf profile: profile {words[2]} isn't in profiles/; known are smoke, tiny")
    params.write_text(file.read_text())
elif words[:1] == ["validate"]:
    if "seed: -" in params.read_text():
        print("cf validate: params.yaml: seed is -1; it must be 0 or more", file=sys.stderr)
        sys.exit(2)
    pathlib.Path(words[words.index("--out") + 1]).write_text("{}") if "--out" in words else None
'''


def make(folder: Path, seconds: float = 0.5) -> Path:
    """The project, committed, with nothing made yet. `seconds` is what slow and stubborn take."""
    assert not folder.exists()
    return copy_of(f"four-stages-{seconds}", lambda at: write(at, seconds), folder)


def make_done(folder: Path) -> Path:
    """The same, after `dvc repro`, with its cache."""
    return copy_of("four-stages-done", lambda at: dvc(make(at), "repro", "-q"), folder)


def write(folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True)
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "work.py": WORK,
        "raw.txt": "a row\n",
        "params.yaml": PARAMS.format(profile="tiny", seconds=seconds),
        "profiles/tiny.yaml": PARAMS.format(profile="tiny", seconds=seconds),
        "profiles/smoke.yaml": PARAMS.format(profile="smoke", seconds=seconds / 2),
        # what flows reads of tasks (tasks/files, tasks/params/yaml_file) comes from the real package
        "tasks/__init__.py": f"__path__.append({str(ROOT / 'tasks')!r})\n",
        "tasks/__main__.py": TASKS,
        "tasks/validate.py": "",
        ".gitignore": "/data/\n/models/\n/reports/\n/trace/\n/runtime/\n/.runs/\n__pycache__/\n",
        ".dvcignore": ".runs\ntrace\nruntime\n__pycache__\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q", "-b", "main")
    dvc(folder, "init", "-q")
    for key, value in {"core.analytics": "false", "core.check_update": "false"}.items():
        dvc(folder, "config", "-q", key, value)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a project")


def environment(**more: str) -> dict[str, str]:
    """Of a process in the project that runs our flows: our code, this interpreter's commands, no server, nothing of the shell's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "CF_", "CUDA_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "PREFECT_LOGGING_COLORS": "false", **more}


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    done = subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(folder: Path, *words: str, code: int = 0) -> str:
    command = [python_folder() / "python", "-m", "dvc", *words]
    done = subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == code, done.stdout
    return done.stdout


def sleeps(process: psutil.Process) -> bool:
    """Was it stopped? A signal takes a moment."""
    until = time.monotonic() + 5
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
        time.sleep(0.01)
    return bool(process.status() == psutil.STATUS_STOPPED)


def pids(folder: Path, name: str) -> list[int]:
    """Processes that have said that they are this stage (or `child`: the stubborn one's)."""
    return [int(file.name.rpartition("-")[2]) for file in (folder / "trace").glob(f"{name}-*")]
