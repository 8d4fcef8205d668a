"""A flow that ended stops everything that its process still runs (flows/supervise/command.py). Tests share a process."""

from __future__ import annotations

import pytest

from flows.project import dvc_command
from flows.supervise import command
from tests.preloaded import PreloadedPython

# files whose DVC is killed, or looked at as a process
REAL_DVC = ("test_pipeline_ended", "test_supervise", "test_doctor")


@pytest.fixture(autouse=True)
def _nothing_is_stopped() -> None:
    command.allow_commands()


@pytest.fixture(autouse=True)
def _dvc_starts_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow in this process starts DVC by a python that has it loaded, which saves a second each time."""
    if request.path.stem not in REAL_DVC:
        monkeypatch.setattr(dvc_command, "sys", PreloadedPython())
