"""`cf repro`: what it says of each stage, what it leaves to DVC, and how it ends. DVC is a script here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.commands.repro import format_seconds

ROOT = Path(__file__).parent.parent
DVC = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
with open("asked", "a") as asked:
    print(*sys.argv[1:], file=asked)
if sys.argv[1] == "checkout":
    sys.exit()
print("Stage 'validate' didn't change, skipping")
print("Running stage 'clips':", "> python -m tasks clips", sep="\\n", flush=True)
time.sleep(1)
pathlib.Path("runtime").mkdir(exist_ok=True)
pathlib.Path("runtime/clips.json").write_text(json.dumps(dict(wall_seconds=30)))
pathlib.Path("runtime/base.json").write_text(json.dumps(dict(wall_seconds=30)))
os.utime("runtime/base.json", (1, 1))  # of a run before
print("Running stage 'filter':", flush=True)
if os.environ.get("HANG"):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(255)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dvc").write_text(DVC)
    (tmp_path / "bin/dvc").chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "params.yaml").write_text("profile: tiny\n")
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    seconds = {"clips": 10, "filter": 7, "base": 20}
    file = tmp_path / "benchmarks/results/tiny-runtime.json"
    file.write_text(json.dumps({stage: {"wall_seconds": value} for stage, value in seconds.items()}))
    return tmp_path


def start(project: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """With the script before any other dvc: `cf` puts the folder of its own Python first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.executable = 'bin/python'; from tasks.__main__ import cli; cli()"
    env = os.environ | environment
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, "repro", *words]
    return subprocess.Popen(command, cwd=project, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_each_stage_has_its_number_and_its_time_on_this_machine(project: Path) -> None:
    output, errors = (process := start(project, "-f", "-s", "filter")).communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert lines[:6] == [
        "Stage 'validate' didn't change, skipping",
        "2 of 14, stage clips, about 10 s",
        "Running stage 'clips':",
        "> python -m tasks clips",
        "3 of 14, stage filter, about 20 s",
        "Running stage 'filter':",
    ]
    assert lines[-1].startswith("stage2, diversity")
    assert (project / "asked").read_text() == "--wait-for-lock repro -f -s filter\n"


def test_other_profiles_have_no_times(project: Path) -> None:
    (project / "params.yaml").write_text("profile: smoke\n")
    assert "\n3 of 14, stage filter\nRunning" in start(project).communicate(timeout=300)[0]


def test_a_failure_brings_the_last_outs_back(project: Path) -> None:
    output, _ = (process := start(project, CODE="255")).communicate(timeout=300)
    assert process.returncode == 1 and "diversity" not in output
    assert (project / "asked").read_text().splitlines()[1:] == ["checkout --quiet"]


def test_a_record_of_locks_that_a_kill_has_torn_is_removed(project: Path) -> None:
    (project / ".dvc/tmp").mkdir(parents=True)
    (project / ".dvc/tmp/rwlock").write_text('{"write": ')
    output, _ = start(project).communicate(timeout=300)
    assert output.startswith(".dvc/tmp/rwlock is torn, as a kill or a full disk leaves it: removed")
    assert not (project / ".dvc/tmp/rwlock").exists()


def test_ctrl_c_waits_for_dvc(project: Path) -> None:
    process = start(project, HANG="1")
    until = time.monotonic() + 30
    while not (project / "runtime/base.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and output.endswith("interrupted\n") and "Traceback" not in errors
    assert (project / "asked").read_text().splitlines()[1:] == ["checkout --quiet"]


def test_seconds_as_a_person_says_them() -> None:
    assert [format_seconds(value) for value in (0.2, 4.4, 17, 94, 96, 600)] == ["1 s", "4 s", "20 s", "90 s", "2 min", "10 min"]
