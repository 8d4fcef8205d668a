"""The CF_* variables: one class knows all of them, prints them, and says in a sentence what is wrong with one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.files.settings import read_settings
from tasks.params import environment

ROOT = Path(__file__).parents[1]
NAMES = {environment.variable_name(field) for field in environment.Environment.model_fields}


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CF_")]:
        monkeypatch.delenv(name)


def test_every_variable_that_is_read_anywhere_is_known() -> None:
    files = [file for folder in ("flows", "tasks", "cf_model", "infra") for file in (ROOT / folder).rglob("*") if file.suffix != ".pyc"]
    texts = [file.read_text() for file in (*files, ROOT / "Makefile") if file.is_file()]
    used = {name for text in texts for name in re.findall(r"(?<![\w.])CF_[A-Z_]*[A-Z]\b", text)}
    assert used - {"CF_ALERT"} <= NAMES


def test_values_are_of_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (read_settings().runs, read_settings().grace, read_settings().gpus, read_settings().ignore_plan) == (1, 4.0, None, False)
    for name, value in {"CF_RUNS": "2", "CF_GPU_LOCKS": "/locks", "CF_IGNORE_PLAN": "1", "CF_KEPT": "off", "CF_HOST": ""}.items():
        monkeypatch.setenv(name, value)
    stated = read_settings()
    assert (stated.runs, stated.gpu_locks, stated.ignore_plan, stated.clip_cache, stated.host) == (2, Path("/locks"), True, "off", None)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("CF_RANKS", "two", "a whole number from 1 on"),
        ("CF_GPUS", "-1", "the number of GPUs of this machine, 0 or more"),
        ("CF_GRACE", "soon", "seconds, 0 or more"),
        ("CF_IGNORE_PLAN", "maybe", "1 or 0"),
    ],
)
def test_a_malformed_value_is_one_sentence(name: str, value: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        read_settings()
    assert str(refused.value) == f"{name} is {value!r}; it must be {rule}"


def test_the_command_prints_them_and_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CF_ALERT_URL", "https://hush")
    monkeypatch.setenv("CF_RUNS", "3")
    monkeypatch.setenv("CF_GPUSS", "1")
    environment.main([])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in NAMES) and "hush" not in printed
    assert re.search(r"CF_RUNS +3 \(default: 1\)\n +Flow runs at a time", printed)
    assert "warning: CF_GPUSS means nothing here; did you mean CF_GPUS" in printed
    assert len(read_settings().find_unknown()) == 1


def test_help_does_not_pay_for_it() -> None:
    python = "import sys, tasks.__main__ as cf; cf.main(['--help']); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, timeout=120).returncode == 0
