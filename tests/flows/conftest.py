"""A flow that ended stops everything that its process still runs (flows/supervise/command.py). Tests share a process."""

from __future__ import annotations

import pytest

from flows.supervise import command


@pytest.fixture(autouse=True)
def _nothing_is_stopped() -> None:
    command.allow_commands()
