"""`cf doctor` sees what was broken on purpose, says what to do, and mends what is stale when it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace as Thing
from typing import Any

import psutil
import pytest

from flows.doctor import command, server, this_machine
from flows.machine import programs
from flows.machine.settings import Machine, read_machine
from tasks.files.words import count_things
from tests.flows import project


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """As little of a checkout as the checks look at; the one that calls DVC makes it a repository first."""
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("CF_", "PREFECT_", "WANDB_", "TORCH_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CF_PORT", "4999")
    monkeypatch.setenv("CF_GPUS", "0")
    return read_machine()


def test_packages_that_do_not_fit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip check` says it; what the project's own ranges exclude breaks something without a word."""
    conflicts = "context-forcing 0.1.0 has requirement sqlalchemy<2.1,>=2.0, but you have sqlalchemy 2.1.9.\n"
    conflicts += "prefect 3.8.8 requires x, which is not installed.\n"
    for output, levels in ((conflicts, ["fail", "warn"]), ("No broken requirements found.\n", ["ok"])):
        done = subprocess.CompletedProcess([], len(levels) - 1, output, "")
        with monkeypatch.context() as patched:
            patched.setattr(this_machine.subprocess, "run", lambda *_, done=done, **__: done)
            found = [line for line in this_machine.check_versions(machine, False) if line.name == "versions"]
        assert [line.level for line in found] == levels
        assert len(levels) == 1 or ("sqlalchemy 2.1.9" in found[0].said and "pip install -r requirements/cpu.txt" in found[0].todo)


def test_the_packages_here_are_checked(machine: Machine) -> None:
    (line,) = [line for line in this_machine.check_versions(machine, False) if line.name == "versions"]
    assert line.level == "ok"


def test_a_fresh_clone_gets_no_warning_of_prefects(machine: Machine) -> None:
    python = "import os; from flows.machine import settings; os.environ.update(settings.process_environment(settings.read_machine()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{python}; import prefect.context"], env=project.environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), "it could not make its home in a folder that is not there"


@pytest.mark.parametrize("number, thing, said", [(1, "error", "1 error"), (0, "run", "0 runs"), (2, "process", "2 processes")])
def test_numbers_of_things(number: int, thing: str, said: str) -> None:
    assert count_things(number, thing) == said


def test_a_variable_that_means_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.level for line in this_machine.check_environment(machine, False)] == ["ok"]
    monkeypatch.setenv("CF_ALERTURL", "http://hush")
    (line,) = this_machine.check_environment(machine, False)
    assert line.level == "warn" and "CF_ALERTURL means nothing here; did you mean CF_ALERT_URL" in line.said and "hush" not in line.said


def test_leftovers_of_a_killed_copy(machine: Machine) -> None:
    project.dvc(machine.root, "init", "-q", "--no-scm", "-f")
    folder = machine.root / ".dvc/cache/files/md5/ab"
    folder.mkdir(parents=True)
    for name in ("old", "new"):
        (folder / f".{name}.tmp").write_text("half a file")
    (folder / "whole").write_text("a file")
    os.utime(folder / ".old.tmp", (0, time.time() - 7200))
    (line,) = this_machine.check_leftovers(machine, False)
    assert line.level == "warn" and line.said.startswith("1 leftover of ")
    (line,) = this_machine.check_leftovers(machine, True)
    assert line.level == "ok" and sorted(file.name for file in folder.iterdir()) == [".new.tmp", "whole"]
    assert [line.said for line in this_machine.check_leftovers(machine, False)] == ["no leftovers of interrupted copies"]


def test_a_lock_whose_holder_is_dead(machine: Machine) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = machine.root / ".dvc/tmp/rwlock"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"write": {"data": {"pid": dead.pid, "cmd": "dvc repro"}}}))
    (line,) = this_machine.check_locks(machine, False)
    assert line.level == "warn" and str(dead.pid) in line.said
    file.write_text(json.dumps({"write": {"data": {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    assert [line.level for line in this_machine.check_locks(machine, True)] == ["ok"] and str(os.getpid()) in file.read_text()
    file.write_text(json.dumps({"write": {"data": {"pid": dead.pid, "cmd": "dvc repro"}}}))
    assert [line.level for line in this_machine.check_locks(machine, True)] == ["ok"] and file.read_text() == "{}"
    both = json.dumps({"write": {"data": {"pid": dead.pid}}, "read": {"out": [{"pid": os.getpid()}]}})
    file.write_text(both)
    assert [line.level for line in this_machine.check_locks(machine, True)] == ["warn"] and file.read_text() == both


@pytest.mark.parametrize("record", ["", '{"write": {"data": {"pid"', "[]", '{"data": {}}', "\0\0"])
def test_a_record_of_locks_that_no_dvc_can_read(machine: Machine, record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill or a full disk while DVC writes it. With a dvc at work, what that one holds is not known."""
    file = machine.root / ".dvc/tmp/rwlock"
    file.write_text(record)
    with suppress(RuntimeError):  # here is no repository for DVC
        this_machine.cache_folder(machine)  # as the check of the disk does before, which must not mend it without a word
    (line,) = this_machine.check_locks(machine, False)
    assert line.level == "fail" and "is torn" in line.said and "cf doctor --fix" in line.todo
    waiting = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "dvc"]
    for folder, level in ((machine.root, "fail"), (machine.root.parent, "ok")):
        with subprocess.Popen(waiting, cwd=folder, stdout=subprocess.PIPE) as dvc:
            assert dvc.stdout and dvc.stdout.readline()
            (line,) = this_machine.check_locks(machine, True)
            dvc.kill()
        assert line.level == level and (level == "ok" or f"process {dvc.pid}" in line.said), line
        assert file.exists() == (level == "fail")


def test_a_build_that_was_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine.root / "extensions"
    (folder / "py311/cpu_adam").mkdir(parents=True)
    (folder / "py311/cpu_adam/lock").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setattr(this_machine.psutil, "process_iter", lambda names: iter(()))
    (line,) = this_machine.check_extensions(machine, False)
    assert line.level == "warn" and line.todo == f"rm {folder}/py311/cpu_adam/lock"
    list(this_machine.check_extensions(machine, True))
    assert list(this_machine.check_extensions(machine, False)) == []


def test_a_full_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.shutil, "disk_usage", lambda root: Thing(free=2**28))
    (line,) = this_machine.check_disk(machine, False)
    assert line.level == "fail" and line.said.startswith("0.2 GiB free")
    assert "dvc gc" not in line.todo and "`cf gc --delete`" in line.todo


def test_a_disk_too_small_for_a_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what dvc.lock says that it makes; the cache may be on another disk, and may not be there yet."""
    assert [line.level for line in this_machine.check_disk(machine, False)] == ["ok"]
    (machine.root / "dvc.lock").write_text(f"stages: {{a: {{outs: [{{path: x, size: {2**40}}}]}}}}\n")
    monkeypatch.setattr(this_machine.shutil, "disk_usage", lambda folder: Thing(free=2**36))
    assert [line.level for line in this_machine.check_disk(machine, False)] == ["fail"]
    (machine.root / "dvc.lock").unlink()
    monkeypatch.setattr(this_machine, "cache_folder", lambda machine: Path("/proc/not/there"))
    monkeypatch.setattr(this_machine.shutil, "disk_usage", lambda folder: Thing(free=2**20 if folder == Path("/proc") else 2**40))
    assert [(line.level, " at /proc;" in line.said) for line in this_machine.check_disk(machine, False)] == [("fail", True), ("ok", False)]


def test_a_gpu_whose_holder_is_dead(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setenv("CF_GPUS", "3")
    monkeypatch.setattr(this_machine.gpus, "find_holders", lambda: {0: None, 1: os.getpid(), 2: dead.pid})
    lines = [line for line in this_machine.check_gpus(machine, False) if "torch" not in line.said]
    assert [line.level for line in lines] == ["ok", "ok", "warn"] and "fuser -v" in lines[2].todo


def test_online_without_a_key(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(machine.root))
    assert [line.level for line in this_machine.check_wandb(machine, False)] == ["fail"]
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    (line,) = this_machine.check_wandb(machine, False)
    assert line.level == "ok" and "a key" not in str(line)


def test_nobody_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the environment of the processes that would tell."""
    assert list(server.check_alerts(machine, False)) == []
    env = project.environment()
    waiting = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    deaf = subprocess.Popen(waiting, env=env, stdout=subprocess.PIPE)
    good = subprocess.Popen(waiting, env=env | {"CF_ALERT_URL": "http://hush"}, stdout=subprocess.PIPE)
    try:
        for process in (deaf, good):
            assert process.stdout and process.stdout.readline(), "from here on its environment can be read"
        found = {"worker": psutil.Process(deaf.pid), "watch": psutil.Process(good.pid)}
        monkeypatch.setattr(programs, "find_process", lambda machine, name: found[name])
        lines = list(server.check_alerts(machine, False))
        assert [(line.level, line.todo) for line in lines] == [("warn", "CF_ALERT_URL=https://... make down up"), ("ok", "")]
        assert "hush" not in str(list(server.check_alerts(machine, False)))
    finally:
        deaf.kill()
        good.kill()
        deaf.wait()
        good.wait()


def test_a_check_that_breaks_is_a_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine, fix: bool) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(this_machine, "check_disk", broken)
    monkeypatch.setattr(this_machine, "check_versions", lambda machine, fix: iter(()))
    # else it would be this process's for good
    monkeypatch.setattr(command, "process_environment", lambda machine: {"PATH": os.environ["PATH"]})
    lines = command.examine_machine(machine)
    (line,) = [line for line in lines if line.name == "broken"]
    assert line.level == "warn" and "no such thing" in line.said and len(lines) > 8


def test_the_command(machine: Machine) -> None:
    """No server is no failure, but a supervisor that had died is one. With a server, and as JSON: tests/system."""
    machine.folder.mkdir(exist_ok=True)
    machine.file("supervisor.pid").write_text("1")
    env = project.environment(CF_PORT="4999", CF_GPUS="0", WANDB_MODE="offline")
    words = [sys.executable, "-m", "flows.doctor.command"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=machine.root)
    failed = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert done.returncode == 1 and len(failed) == 1 and "fail supervisor   it had died" in failed[0], done.stdout + done.stderr
    assert "warn server" in done.stdout and "Traceback" not in done.stderr


class Client:
    """Of a server that knows one deployment and these runs."""

    def __init__(self, runs: list[Any], **deployment: Any) -> None:
        now = datetime.now(UTC)
        stated = {"id": "5f2c3e7e-8d5e-4b8e-9a63-0d9a3d6a1f11", "name": "nightly", "paused": False, "schedules": [Thing(active=True)]}
        self.deployment = Thing(**(stated | {"created": now - timedelta(days=9), "updated": now - timedelta(days=9)} | deployment))
        self.runs = runs

    def read_deployments(self) -> list[Any]:
        return [self.deployment]

    def read_flow_runs(self, *, flow_run_filter: Any, **_: Any) -> list[Any]:
        (wanted,) = flow_run_filter.state.type.any_
        return [run for run in self.runs if run.state == wanted.value]


def run(state: str, days: float) -> Any:
    when = datetime.now(UTC) + timedelta(days=days)
    return Thing(state=state, auto_scheduled=True, expected_start_time=when, end_time=when)


def said(client: Any) -> list[tuple[str, str]]:
    return [(line.level, line.said.split(":")[0]) for line in server.check_schedules(client)]


def test_a_schedule_that_never_runs() -> None:
    good = [run("SCHEDULED", 0.5), run("COMPLETED", -0.5)]
    assert said(Client(good)) == [("ok", "nightly")]
    assert said(Client(good[1:]))[0][0] == "fail"
    assert "it will never run" in next(server.check_schedules(Client(good[1:]))).said  # type: ignore[arg-type]
    assert said(Client(good[1:], updated=datetime.now(UTC)))[0][0] == "ok"
    assert [level for level, _ in said(Client(good[:1]))] == ["ok", "warn"]
    assert said(Client(good, paused=True)) == [("warn", "nightly has a schedule that is paused")]
    assert said(Client([], schedules=[])) == [("ok", "nightly")]
