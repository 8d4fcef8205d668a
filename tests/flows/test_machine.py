"""Processes and settings of one machine, without a server. With one: tests/system."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.machine import processes, programs, reconcile, settings, up

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / ".machine").mkdir()
    for name in list(os.environ):
        if name.startswith(("CF_", "PREFECT_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stubborn(checkout: Path) -> Iterator[subprocess.Popen[str]]:
    """Has the mark of the checkout, a session of its own, and ignores SIGTERM."""
    env = os.environ | {processes.MARK: str(checkout), "PREFECT__FLOW_RUN_ID": "a-run"}
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    assert child.stdout and child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.wait()


def test_a_zombie_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    deadline = time.monotonic() + 20
    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes.is_running(process)
    child.wait()


def test_what_has_the_mark_is_found_and_ended(checkout: Path, stubborn: subprocess.Popen[str]) -> None:
    assert [one.pid for one in processes.find_marked(checkout)] == [stubborn.pid]
    assert processes.find_marked(checkout / "other") == []
    assert {run: [one.pid for one in found] for run, found in processes.find_run_processes(checkout).items()} == {"a-run": [stubborn.pid]}
    killed = processes.end_processes(processes.find_marked(checkout), 0.3)
    assert [one.pid for one in killed] == [stubborn.pid]
    assert stubborn.wait(10) == -signal.SIGKILL
    assert processes.find_marked(checkout) == []


def test_down_without_a_supervisor_ends_what_is_left(
    checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "GRACE", 0.3)
    assert up.stop_everything(settings.read_machine()).startswith("stopped: 1 process")
    assert stubborn.wait(10) == -signal.SIGKILL
    assert up.stop_everything(settings.read_machine()) == "nothing of this checkout is up"


@pytest.mark.parametrize("error, sentence", [("Traceback\nHTTPStatusError: 401\n", "HTTPStatusError: 401"), ("", "exit code 1")])
def test_a_server_that_refuses_to_hear_of_runs_stops_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str, sentence: str
) -> None:
    done = subprocess.CompletedProcess([], 1, "run a: it is Crashed now\n", error)
    monkeypatch.setattr(up.subprocess, "run", lambda *_, **__: done)
    up.close_runs(settings.read_machine())
    assert capsys.readouterr().out == f"run a: it is Crashed now\nwarning: runs that died could not all be closed: {sentence}\n"


def test_the_worker_is_stopped_before_its_runs_and_the_server_after(
    checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the worker would start the next run that waits, and nobody would be told of those that died."""
    order: list[str] = []
    supervisor = SimpleNamespace(stopProcess=lambda name: order.append(f"stop {name}"), getPID=lambda: stubborn.pid)
    end = processes.end_processes

    def end_processes(which: Iterable[psutil.Process], grace: float) -> list[psutil.Process]:
        which = list(which)
        numbers = [process.pid for process in which]
        order.append(f"end {'run' if numbers == [stubborn.pid] else numbers}")
        return end(which, 0.1) if len(order) > 4 else []

    monkeypatch.setattr(programs, "connect", lambda machine: supervisor)
    monkeypatch.setattr(up, "is_healthy", lambda machine: True)
    monkeypatch.setattr(up, "close_runs", lambda machine: order.append("close runs"))
    monkeypatch.setattr(processes, "end_processes", end_processes)
    up.stop_everything(settings.read_machine())
    assert order[:4] == ["stop worker", "end run", "end run", "close runs"]


def test_a_worker_ends_and_closes_the_runs_of_the_one_before(
    checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, str]] = []

    def become(program: str, words: list[str], env: dict[str, str]) -> None:
        assert stubborn.wait(10) == -signal.SIGKILL, "its runs would say Running for ever"
        assert closed and words[-2:] == ["--limit", "1"]
        begun.append(env)

    closed: list[object] = []
    monkeypatch.setattr(up, "is_healthy", lambda machine: True)
    monkeypatch.setattr(up, "close_runs", closed.append)
    monkeypatch.setattr(programs, "GRACE", 0.3)
    monkeypatch.setattr(up.os, "execve", become)
    up.run_worker([])
    assert begun[0]["PREFECT_CLIENT_MAX_RETRIES"] == "8" and begun[0]["CF_REPORTS"] == "http://127.0.0.1:5200"


# -------------------------------------------------------------- supervisor itself, with programs that are no Prefect


SLEEP = [sys.executable, "-c", "import os, time; print('up', os.environ.get('SECRET'), flush=True); time.sleep(600)"]


@pytest.fixture
def supervised(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[settings.Machine]:
    """A supervisor whose programs only sleep."""
    monkeypatch.setattr(programs, "read_commands", lambda machine: dict.fromkeys(("server", "worker"), SLEEP))
    machine = settings.read_machine()
    programs.start_supervisor(machine, {"SECRET": "hush"})
    yield machine
    up.stop_everything(machine)
    assert processes.find_marked(checkout) == []


def wait(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_that_is_killed_is_back(supervised: settings.Machine) -> None:
    wait(lambda: "up hush" in programs.read_log(supervised.file("server.log")))
    first = programs.find_process(supervised, "server")
    assert first and programs.read_states(supervised) == {"server": "STARTING", "worker": "STARTING"}
    first.kill()
    wait(lambda: (now := programs.find_process(supervised, "server")) and now.pid != first.pid)
    wait(lambda: programs.read_log(supervised.file("server.log")).count("up hush") == 2)


def test_supervisor_is_this_users_alone(supervised: settings.Machine) -> None:
    socket_file = supervised.file("socket")
    assert stat.S_IMODE(socket_file.stat().st_mode) == 0o700
    supervisor = psutil.Process(programs.connect(supervised).getPID())
    assert not [one for one in supervisor.net_connections("inet") if one.status == psutil.CONN_LISTEN], "no port"
    assert not [file for file in supervised.folder.glob("*") if file.is_file() and file.suffix != ".log" and "hush" in file.read_text()]


def test_what_a_supervisor_that_was_killed_has_left_is_ended(supervised: settings.Machine, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [supervised.file(f"{name}.log") for name in ("server", "worker")]
    wait(lambda: all("up hush" in programs.read_log(log) for log in logs))  # else they die of their first line, which nobody reads
    psutil.Process(programs.connect(supervised).getPID()).kill()
    wait(lambda: programs.connect(supervised) is None)
    assert len(processes.find_marked(supervised.root)) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    up.prepare_start(replace(supervised, port=port))
    assert processes.find_marked(supervised.root) == []
    assert "ending 2 processes" in capsys.readouterr().out


def test_a_checkout_that_is_too_deep(checkout: Path) -> None:
    with pytest.raises(ValueError, match="a unix socket's path 98 at most; move the checkout to a shorter path"):
        programs.start_supervisor(settings.Machine(checkout / ("x" * 99), "127.0.0.1", 4999, 1), {})


def test_only_the_server_is_told_the_secrets_by_supervisor(checkout: Path) -> None:
    for name, words in programs.read_commands(settings.read_machine()).items():
        assert (settings.DATABASE in words and settings.PASSWORD in words) == (name != "server")


@pytest.mark.parametrize("later", [None, psutil.Process(1)])
def test_a_program_that_ends_while_it_starts(checkout: Path, monkeypatch: pytest.MonkeyPatch, later: psutil.Process | None) -> None:
    """Dead, or started again by supervisor before anybody looked."""
    found = iter([psutil.Process(), psutil.Process(), later])
    monkeypatch.setattr(programs, "find_process", lambda machine, name: next(found))
    (checkout / ".machine/server.log").write_text("first\nthe reason\n")
    with pytest.raises(ValueError, match=r"the server ended while it started, with: first \| the reason; `cf doctor` checks the versions"):
        up.wait_for(settings.read_machine(), "server", lambda: False)


def test_up_says_at_once_what_it_starts(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(*_: object) -> None:
        raise ValueError("it ended")

    monkeypatch.setattr(programs, "start_supervisor", ends)
    monkeypatch.setattr(up, "prepare_start", lambda machine: None)
    with pytest.raises(ValueError, match="it ended"):
        up.start_machine([])
    assert capsys.readouterr().out.startswith("starting supervisor, and by it server, worker, watch and reports")


def test_one_up_or_down_at_a_time(checkout: Path) -> None:
    machine = settings.read_machine()
    with up.lock_machine(machine), pytest.raises(ValueError, match="another `cf up` or `cf down`"), up.lock_machine(machine):
        pass


def test_who_has_a_port(checkout: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        assert f"process {os.getpid()} (" in (processes.find_port_holder(port) or "")
        with pytest.raises(ValueError, match=rf"port {port} is taken by process .*CF_PORT={port + 1} make up"):
            up.prepare_start(settings.Machine(checkout, "127.0.0.1", port, 1))
    assert processes.find_port_holder(port) is None


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("CF_PORT", "http", "CF_PORT is 'http'; it must be a whole number from 1 to 65535"),
        ("CF_PORT", "70000", "CF_PORT is '70000'; it must be a whole number from 1 to 65535"),
        ("CF_RUNS", "0", "CF_RUNS is '0'; it must be a whole number from 1 to 64"),
        ("CF_GRACE", "soon", "CF_GRACE is 'soon'; it must be seconds, 0 or more"),
        ("CF_HOST", "0.0.0.0", "CF_HOST is 0.0.0.0, which others can reach; state PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD"),
    ],
)
def test_what_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        settings.read_machine()
    assert str(refused.value).startswith(sentence)


def test_the_port_of_the_last_time(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.read_machine().port == 4200
    (checkout / ".machine/port").write_text("4321")
    assert settings.read_machine().port == 4321
    monkeypatch.setenv("CF_PORT", "4322")
    assert settings.read_machine().port == 4322
    (checkout / ".machine/host").write_text("0.0.0.0")
    assert settings.read_machine().host == "0.0.0.0", "`cf down` has no need of the password"
    with pytest.raises(ValueError, match="which others can reach"):
        up.prepare_start(settings.read_machine())
    monkeypatch.setenv("CF_HOST", "::1")
    assert settings.read_machine().url == "http://[::1]:4322"
    monkeypatch.chdir(checkout.parent)
    with pytest.raises(ValueError, match=r"has no dvc\.yaml"):
        settings.read_machine()


def test_only_the_server_is_told_the_secrets(checkout: Path) -> None:
    url = "postgresql+asyncpg://someone:hush@db.example/prefect"
    given = {"PATH": "/bin", settings.DATABASE: url, settings.PASSWORD: "me:shh", "PYTHONPATH": "/elsewhere"}
    told = settings.process_environment(settings.read_machine(), given)
    assert "hush" not in str(told) and settings.PASSWORD not in told
    assert told["PREFECT_API_AUTH_STRING"] == "me:shh"
    assert told["PYTHONPATH"] == f"{checkout}{os.pathsep}/elsewhere"
    own, said = settings.server_secrets(given)
    assert own == {settings.DATABASE: url, settings.PASSWORD: "me:shh"} and said == "Postgres at db.example"
    assert settings.server_secrets({}) == ({}, "SQLite")
    with pytest.raises(ValueError) as refused:
        settings.server_secrets({settings.DATABASE: "postgres://someone:hush@db.example/prefect"})
    assert "hush" not in str(refused.value) and "postgresql+asyncpg://" in str(refused.value)


def test_what_everything_is_told_of_prefect(checkout: Path) -> None:
    told = settings.process_environment(settings.read_machine(), {})
    assert told["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] == "prefect.server.concurrency.lease_storage.filesystem"
    assert told["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "45"


def test_runs_that_this_worker_took(checkout: Path) -> None:
    assert reconcile.read_taken_runs(checkout) == set()
    run = "4f19a88d-0704-4a89-a476-eeb87f9c4102"
    (checkout / ".machine/worker.log").write_text(f"18:41 | INFO | Worker 'ProcessWorker 1' submitting flow run '{run}'\nslow: 1 of 2\n")
    assert reconcile.read_taken_runs(checkout) == {run}
    (checkout / ".machine/worker.log").rename(checkout / ".machine/worker.log.1")
    assert reconcile.read_taken_runs(checkout) == {run}
