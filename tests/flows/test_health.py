"""What `cf doctor` makes of a server's answers; the server is a few objects. With a real one: tests/system."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace as Thing
from typing import Any

import psutil
import pytest

from flows.doctor import server
from flows.machine import programs
from flows.machine.settings import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / ".machine").mkdir()
    return Machine(tmp_path, "127.0.0.1", 4999, 1)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> psutil.Process:
    """The checkout's worker."""
    process = psutil.Process()
    monkeypatch.setattr(programs, "find_process", lambda machine, name: process)
    return process


def client(runs: list[Any] | None = None, slots: int = 0, paused: bool = False) -> Any:
    return Thing(
        read_flow_runs=lambda flow_run_filter: runs or [],
        read_global_concurrency_limits=lambda limit, offset: [Thing(name="deployment:1", active_slots=slots)],
        read_work_pools=lambda: [Thing(name="cf", is_paused=paused)],
    )


def test_slots_that_nobody_holds(machine: Machine) -> None:
    assert [line.level for line in server.check_stuck_runs(client(), machine, False)] == ["ok"]
    (bad, _) = server.check_stuck_runs(client(slots=1), machine, False)
    assert bad.level == "fail" and bad.todo == "prefect gcl update deployment:1 --active-slots 0"
    assert [line.level for line in server.check_stuck_runs(client([Thing(id=1, state=None)], slots=1), machine, False)] == ["ok"]


def test_a_pool_that_is_paused(machine: Machine, own: psutil.Process) -> None:
    assert [line.level for line in server.check_worker(client(), machine)] == ["ok"]
    bad, _ = server.check_worker(client(paused=True), machine)
    assert bad.level == "fail" and bad.todo == "prefect work-pool resume cf"


def test_runs_are_late_and_nobody_takes_them(machine: Machine) -> None:
    (bad,) = server.check_worker(client([Thing()]), machine)
    assert bad.level == "fail" and bad.said == "none of this checkout runs; 1 run late" and bad.todo == "`make up` starts it"
    assert [line.level for line in server.check_worker(client(), machine)] == ["warn"]


def test_a_program_that_supervisor_has_given_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"server": "FATAL", "worker": "RUNNING", "watch": "STARTING", "reports": "BACKOFF"}
    monkeypatch.setattr(programs, "read_states", lambda machine: states)
    assert [line.said for line in server.check_programs(machine, False)] == [
        "the program server is FATAL",
        "the program reports is BACKOFF",
    ]
    states.clear()
    assert list(server.check_programs(machine, False)) == []
    machine.file("supervisor.pid").write_text("1")
    assert [line.level for line in server.check_programs(machine, False)] == ["fail"]


def test_errors_in_the_log_since_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    assert list(server.check_server_log(log)) == []
    log.write_text("old | ERROR | old\nCheck out the dashboard at http\n12 | INFO | fine\n")
    assert list(server.check_server_log(log)) == []
    log.write_text(log.read_text() + "x" * 300_000 + f"\n13 | ERROR | scheduler {os.getpid()}\n")
    (bad,) = server.check_server_log(log)
    assert bad.level == "warn" and bad.said.startswith("1 error in") and f"scheduler {os.getpid()}" in bad.said
