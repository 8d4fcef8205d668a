"""Processes and settings of one machine, without a server. With one: tests/system."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.machine import processes, reconcile, settings, up
from flows.supervise import guardian
from tests.flows import project

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


def test_a_number_that_another_process_has_by_now_is_not_ours(checkout: Path) -> None:
    file = checkout / "server.pid"
    assert processes.noted(file) is None
    processes.note(file, os.getpid())
    found = processes.noted(file)
    assert found and found.pid == os.getpid()
    stated = json.loads(file.read_text())
    file.write_text(json.dumps(stated | {"began": guardian.began(1)}))
    assert processes.noted(file) is None
    file.write_text("")
    assert processes.noted(file) is None


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


def test_down_without_a_server_ends_what_is_left(checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "GRACE", 0.3)
    assert up.stop_everything(settings.read_machine()).startswith("stopped: 1 processes")
    assert stubborn.wait(10) == -signal.SIGKILL
    assert up.stop_everything(settings.read_machine()) == "nothing of this checkout is up"


def test_down_goes_on_when_the_server_refuses_to_hear_of_runs(
    checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes.note(checkout / ".machine/server.pid", stubborn.pid)
    monkeypatch.setattr(up, "is_healthy", lambda machine: True)
    monkeypatch.setattr(up, "GRACE", 0.3)
    done = subprocess.CompletedProcess([], 1, "run a: it is Crashed now\n", "Traceback\nPrefectHTTPStatusError: 401\n")
    with monkeypatch.context() as patched:
        patched.setattr(up.subprocess, "run", lambda *_, **__: done)
        assert up.stop_everything(settings.read_machine()).startswith("stopped: 1 processes")
    assert stubborn.wait(10) == -signal.SIGKILL
    assert capsys.readouterr().out == (
        "run a: it is Crashed now\nwarning: runs that died could not all be closed: PrefectHTTPStatusError: 401\n"
    )


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_worker_sleeps_while_runs_are_ended(
    checkout: Path, stubborn: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Else it would start the next one; and it wakes also when somebody loses patience."""
    worker = psutil.Process(stubborn.pid)
    processes.note(checkout / ".machine/worker.pid", worker.pid)
    seen: list[bool] = []

    def end(*_: object) -> list[psutil.Process]:
        seen.append(project.sleeps(worker))
        if interrupted:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(processes, "end_processes", end)
    with pytest.raises(KeyboardInterrupt if interrupted else ValueError):  # these survived
        up.stop_everything(settings.read_machine())
    assert seen[0] and worker.status() != psutil.STATUS_STOPPED
    processes.note(checkout / ".machine/worker.pid", worker.pid)
    worker.suspend()
    assert project.sleeps(worker)
    assert up.start_worker(settings.read_machine()).startswith("the worker was stopped")
    assert worker.status() != psutil.STATUS_STOPPED
    assert up.start_worker(settings.read_machine()).startswith("the worker is up already")


def test_a_worker_is_started(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is set aside when it is large, and what it said the last time doesn't count."""
    log = checkout / ".machine/worker.log"
    log.write_text("the last time: started!\n" * 9)
    ready: list[bool] = []
    told: dict[str, str] = {}

    def launch(here: settings.Machine, name: str, words: list[str], env: dict[str, str]) -> psutil.Process:
        told.update(env)
        return psutil.Process()

    def wait(here: settings.Machine, name: str, process: psutil.Process, is_ready: Callable[[], bool]) -> None:
        ready.append(is_ready())
        with log.open("a") as file:
            file.write("started!\n")
        ready.append(is_ready())

    for name, value in {"reconcile": lambda machine: None, "launch": launch, "wait": wait}.items():
        monkeypatch.setattr(up, name, value)
    up.start_worker(settings.read_machine())
    assert ready == [False, True] and told["PREFECT_CLIENT_MAX_RETRIES"] == "8"
    monkeypatch.setattr(up, "LOG", 100)
    assert up.log_of(settings.read_machine(), "worker") == log and not log.exists()
    assert (checkout / ".machine/worker.log.1").read_text().count("started!") == 10


def test_who_has_a_port(checkout: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        assert f"process {os.getpid()} (" in (processes.find_port_holder(port) or "")
        with pytest.raises(ValueError, match=rf"port {port} is taken by process .*CF_PORT={port + 1} make up"):
            up.start_server(settings.Machine(checkout, "127.0.0.1", port, 1))
    assert processes.find_port_holder(port) is None


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("CF_PORT", "http", "CF_PORT is 'http'; it must be a whole number from 1 to 65535"),
        ("CF_PORT", "70000", "CF_PORT is '70000'; it must be a whole number from 1 to 65535"),
        ("CF_RUNS", "0", "CF_RUNS is '0'; it must be a whole number from 1 to 64"),
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
        up.start_server(settings.read_machine())
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
