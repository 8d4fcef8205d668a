"""What a newcomer meets: README, Makefile, CI and the pins agree with one another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tasks.commands import repro
from tasks.files import key_numbers

ROOT = Path(__file__).parent.parent


def test_readme_makefile_and_ci_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    readme, ci = ROOT / "README.md", (ROOT / ".ci/run").read_text()
    assert {"repro", "test", "lint", "help"} <= targets
    used = set(re.findall(r"\bmake ([a-z-]+)", ci))
    assert used >= {"lint", "test", "test-system", "repro"} and used <= targets
    if not readme.exists():
        pytest.skip("no README yet")
    shown = set(re.findall(r"(?:^|`)\s*(?:\$ )?(?:\w+=\S+ )?make ([a-z-]+)", readme.read_text(), re.M))
    assert {"repro", "test"} <= shown <= targets


def test_what_is_needed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "requirements/cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            pins[canonical(package)] = version
    assert all(pins.values()) and len(pins) > 50
    for wanted in map(Requirement, project["dependencies"]):
        assert pins[canonical(wanted.name)] in wanted.specifier, wanted


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_make_says_what_can_be_made_and_what_it_needs(tmp_path: Path) -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"  {target}" in shown for target in ("repro", "test", "lint"))
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho Python 3.9.2\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "repro", f"PYTHON={old}", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"{old} is Python 3.9.2, but Python 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not there, and make does without")
def test_two_makes_at_once_do_not_both_install(tmp_path: Path) -> None:
    """As cron and a person may say `make up` when requirements have changed. Each `pip` here needs the folder to itself."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements/cpu.txt", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(f"#!/bin/sh\nmkdir {tmp_path}/alone || exit 1\nsleep 0.5\nrmdir {tmp_path}/alone\n")
    python.chmod(0o755)
    both = [subprocess.Popen(["make", ".venv/.cpu", f"PYTHON={sys.executable}"], cwd=tmp_path) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]


def test_installing_says_how_far_it_is_and_fails_with_the_words_of_pip(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements/cpu.txt", ".venv/bin/python", ".venv/lib/python3.11/site-packages/one.dist-info"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "requirements/cpu.txt").write_text("one==1\ntwo==2\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/sh\necho Collecting one==1\nsleep 4\necho ERROR: no two >&2\nexit 1\n")
    python.chmod(0o755)
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # `make test` would make this one a sub-make
    done = subprocess.run(["make", ".venv/.cpu", f"PYTHON={sys.executable}"], cwd=tmp_path, env=outside, capture_output=True, text=True)
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("installing 2 packages into .venv, once") and last == "  1 of 2 packages fetched, 1 installed"
    assert done.returncode and done.stderr.startswith("ERROR: no two\n") and not (tmp_path / ".venv/.cpu").exists()


def test_the_last_words_of_make_repro(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/report.html").write_text("")
    stage, *keys = next(iter(key_numbers.KEY_NUMBERS.values()))
    value = "12.345678"
    for key in reversed(keys):
        value = f'{{"{key}": {value}}}'
    (tmp_path / f"metrics/{stage}.json").write_text(value)
    said = repro.summarize_run(tmp_path).splitlines()
    assert said[0].endswith(str(tmp_path / "reports/report.html"))
    assert len(said) == 6 and said[1].endswith("12.35") and said[2].endswith("not measured")
