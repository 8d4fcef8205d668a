"""The machine that the system tests share. They run with `make test-system` only: they need minutes, two cores and Chromium."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.driver import Machine, lay_out

collect_ignore_glob = [] if os.environ.get("CF_SYSTEM") else ["test_*.py"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(lay_out(tmp_path_factory.mktemp("system") / "project"))
    try:
        machine.up()
        machine.deployed = time.time()
        machine.command("flows.machine.deploy")
        yield machine
    finally:
        machine.down()
        machine.told.stop()
    assert not machine.marked(), "processes are left"


@pytest.fixture
def machine(whole: Machine) -> Machine:
    """Up again, whatever the test before did to it, and with no run under way."""
    whole.up()
    for run in whole.call("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}):
        whole.finish(run["id"])
    return whole


@pytest.fixture(scope="session")
def shots() -> Path | None:
    """Where screenshots for docs/ go, when they are asked for."""
    wanted = os.environ.get("CF_SCREENSHOTS")
    return Path(wanted) if wanted else None
