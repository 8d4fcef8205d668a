"""A flow that ended stops everything that its process still runs (flows/supervise.py). Tests share a process."""

from __future__ import annotations

import pytest

from flows import supervise


@pytest.fixture(autouse=True)
def _nothing_is_stopped() -> None:
    supervise.start()
