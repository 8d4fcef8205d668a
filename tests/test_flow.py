"""The Prefect flow, really run, without a server, on a DVC project of two stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prefect_database import copy_database
from tests.preloaded import FLOW, python_folder

ROOT = Path(__file__).parent.parent
PIPELINE = """stages:
  first:
    cmd: python -c "print('a line of the stage'); open('a.txt', 'w').write('1')"
    params: [first]
    outs: [a.txt]
  second:
    cmd: python -c "print(open('b.in').read()); open('b.txt', 'w').write(open('a.txt').read())"
    deps: [a.txt]
    params: [second]
    outs: [b.txt]
"""


def dvc(*words: str, at: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([python_folder() / "python", "-m", "dvc", *words, "-q"], cwd=at, env=environment, check=True)


def flow(at: Path) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(at.parent / "prefect"), "PREFECT_LOGGING_COLORS": "false"}
    environment.pop("PREFECT_API_URL", None)
    words = [python_folder() / "python", "-c", FLOW]
    done = subprocess.run(words, cwd=at, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def state(stage: str, said: str) -> str:
    (line,) = [line for line in said.splitlines() if f"'{stage}' - Finished in state" in line]
    return line.rpartition("state ")[2]


@pytest.mark.slow
def test_the_flow_runs_what_dvc_would(tmp_path: Path) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    for folder in (project, other):
        folder.mkdir()
        (folder / "dvc.yaml").write_text(PIPELINE)
        (folder / "params.yaml").write_text("first: 1\nsecond: 1\n")
        (folder / "b.in").write_text("x")
        dvc("init", "--no-scm", at=folder)

    copy_database(tmp_path / "prefect")
    code, said = flow(project)
    assert code == 0 and "a line of the stage" in said, said
    assert state("first", said) == state("second", said) == "Completed()"
    dvc("repro", at=other)
    assert (project / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()

    (project / "params.yaml").write_text("first: 1\nsecond: 2\n")
    (project / "b.in").unlink()
    code, said = flow(project)
    assert code != 0 and "FileNotFoundError" in said, said
    assert state("first", said).startswith("Cached")
    assert state("second", said).startswith("Failed")


def test_the_flow_knows_nothing_of_the_stages() -> None:
    forbidden = ("torch", "numpy", "cf_model", "tasks.parts", "tasks.runner", "tasks.params.schema", "dvc")
    python = f"import sys, flows.pipeline; sys.exit(' '.join(m for m in {forbidden} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
