"""`cf up`, `cf down`: one machine's Prefect server and worker, on 127.0.0.1, with all their files in .machine/.

Starting what runs already does nothing, so a crontab line that says `make up` every five minutes brings back what died.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows import processes

POOL = "cf"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # user:password; clients have it as PREFECT_API_AUTH_STRING
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
PATIENCE = 180.0  # seconds for a start: 10 on a quiet machine, 40 were seen on a busy one
GRACE = 8.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Machine:
    """What belongs to one checkout. Two checkouts can be up at the same time, at different ports."""

    root: Path
    host: str
    port: int
    runs: int  # flow runs at a time

    @property
    def folder(self) -> Path:
        return self.root / ".machine"

    @property
    def url(self) -> str:
        local = "127.0.0.1" if self.host in ("0.0.0.0", "localhost", "::", "::1") else self.host
        return f"http://{local}:{self.port}"

    def file(self, name: str) -> Path:
        return self.folder / name


def here(root: Path | None = None) -> Machine:
    """This checkout's, as the environment says: CF_PORT (else the port of the last time, else 4200), CF_RUNS (1), CF_HOST."""
    root = (root or Path.cwd()).resolve()
    if not (root / "dvc.yaml").exists():
        raise ValueError(f"{root} has no dvc.yaml; run cf at the root of the project")
    last = root / ".machine/port"
    port = last.read_text() if last.exists() else "4200"
    numbers = {}
    for name, default, most in (("CF_PORT", port, 65535), ("CF_RUNS", "1", 64)):
        stated = os.environ.get(name, default)
        if not stated.isdecimal() or not 1 <= int(stated) <= most:
            raise ValueError(f"{name} is {stated!r}; it must be a whole number from 1 to {most}")
        numbers[name] = int(stated)
    host = os.environ.get("CF_HOST", "127.0.0.1")
    check_host(host, os.environ)
    return Machine(root, host, numbers["CF_PORT"], numbers["CF_RUNS"])


def check_host(host: str, given: Mapping[str, str]) -> None:
    """Whoever reaches the API may run what the deployments run: beyond this machine only with a password."""
    if host not in LOOPBACK and ":" not in given.get(PASSWORD, ""):
        raise ValueError(f"CF_HOST is {host}, which others can reach; state {PASSWORD}=USER:PASSWORD in the environment, or leave CF_HOST out")


def environment(machine: Machine, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of everything that talks to the server. Only the server itself is told the database: its URL holds a password."""
    kept = {name: value for name, value in given.items() if name not in (DATABASE, PASSWORD, "PREFECT_PROFILE")}
    if PASSWORD in given:
        kept.setdefault("PREFECT_API_AUTH_STRING", given[PASSWORD])
    path = [str(machine.root), *filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {
        processes.MARK: str(machine.root),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PREFECT_HOME": str(machine.file("prefect")),
        "PREFECT_API_URL": f"{machine.url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # the default keeps slots in the server's memory: after its restart they are taken for ever (docs/operating.md)
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "45",
        "PREFECT_LOGGING_COLORS": "false",
    }


def database(given: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str]:
    """What only the server is told, and how to speak of its database without the password in it."""
    own = {name: given[name] for name in (DATABASE, PASSWORD) if name in given}
    stated = given.get(DATABASE)
    if not stated:
        return own, "SQLite"
    parts = urlsplit(stated)
    if parts.scheme not in ("postgresql+asyncpg", "sqlite+aiosqlite"):
        raise ValueError(f"{DATABASE} begins with {parts.scheme}://; Prefect takes postgresql+asyncpg://USER:PASSWORD@HOST/NAME")
    said = f"Postgres at {parts.hostname}" if parts.hostname else "SQLite"
    return own, said


@contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """One up or down at a time; the kernel frees this when its holder dies."""
    machine.folder.mkdir(exist_ok=True)
    with machine.file("lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another `cf up` or `cf down` of this checkout is at work; wait for it") from None
        yield


def healthy(machine: Machine, timeout: float = 3.0) -> bool:
    """Does Prefect answer at the port? Whose it is, the pid file says."""
    try:
        with urllib.request.urlopen(f"{machine.url}/api/health", timeout=timeout) as answer:
            return bool(json.load(answer) is True)
    except (OSError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------------------- up


def up(argv: list[str]) -> None:
    about = "Starts the Prefect server and a worker on 127.0.0.1, or what of them doesn't run. CF_PORT, CF_RUNS; " + DATABASE
    argparse.ArgumentParser("cf up", description=about).parse_args(argv)
    machine = here()
    with alone(machine):
        server = start_server(machine)
        worker = start_worker(machine)
    print(f"{server}\n{worker}\n`cf deploy` sends the deployments there, `cf doctor` looks for what is wrong, `cf down` stops it all")


def start_server(machine: Machine) -> str:
    extra, kept = database()
    running, other = (processes.noted(machine.file(f"{name}.pid")) for name in ("server", "worker"))
    up_at = (running or other) and machine.file("port").read_text()
    if up_at and up_at != str(machine.port):
        raise ValueError(f"this checkout is up at port {up_at} and CF_PORT is {machine.port}; `cf down` first, or leave CF_PORT out")
    if running is None:
        if taken := processes.holder(machine.port):
            raise ValueError(f"port {machine.port} is taken by {taken}; end it, or choose another: CF_PORT={machine.port + 1} make up")
        command = ["server", "start", "--host", machine.host, "--port", str(machine.port)]
        machine.file("port").write_text(str(machine.port))
        running = launch(machine, "server", command, environment(machine) | extra)
    elif healthy(machine):
        return f"the server is up already: {machine.url} (process {running.pid})"
    wait(machine, "server", running, lambda: healthy(machine))
    return f"the server is up: {machine.url} (process {running.pid}, {kept}, log {machine.file('server.log')})"


def start_worker(machine: Machine) -> str:
    running = processes.noted(machine.file("worker.pid"))
    if running is not None:
        return f"the worker is up already (process {running.pid})"
    # runs of a worker that died would say Running for ever
    for said in reconcile(machine):
        print(said)
    log = machine.file("worker.log")
    before = log.stat().st_size if log.exists() else 0
    command = ["worker", "start", "--pool", POOL, "--type", "process", "--limit", str(machine.runs)]
    running = launch(machine, "worker", command, environment(machine))
    wait(machine, "worker", running, lambda: b"started!" in log.read_bytes()[before:])
    return f"the worker is up: pool {POOL}, {machine.runs} at a time (process {running.pid}, log {log})"


def launch(machine: Machine, name: str, words: list[str], env: dict[str, str]) -> psutil.Process:
    """Prefect in a session of its own, so that closing the terminal ends nothing."""
    with machine.file(f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            cwd=machine.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes.note(machine.file(f"{name}.pid"), child.pid)
    return psutil.Process(child.pid)


def wait(machine: Machine, name: str, process: psutil.Process, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        log = machine.file(f"{name}.log")
        if not processes.runs(process):
            last = " | ".join(line for line in log.read_text(errors="replace").splitlines()[-4:] if line.strip())
            raise ValueError(f"the {name} ended while it started, with: {last}; `cf doctor` checks the versions, {log} has the whole")
        if time.monotonic() > deadline:
            raise ValueError(f"the {name} (process {process.pid}) is not ready after {PATIENCE:.0f} s; see {log}, then `cf down`")
        time.sleep(0.25)


def reconcile(machine: Machine) -> list[str]:
    """In a process of its own: Prefect reads where its server is when it is imported."""
    command = [sys.executable, "-m", "flows.reconcile", str(machine.root)]
    done = subprocess.run(command, cwd=machine.root, env=environment(machine), capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise ValueError(f"runs that died could not be closed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.splitlines()


# ----------------------------------------------------------------------------------------------------------- down


def down(argv: list[str]) -> None:
    about = "Stops the worker, the runs it is at and everything below them, and the server. Runs that are stopped so say Crashed."
    argparse.ArgumentParser("cf down", description=about).parse_args(argv)
    machine = here()
    with alone(machine):
        print(stop(machine))


def stop(machine: Machine) -> str:
    """Runs first, while there is a server they can tell; then the worker, the server, and whatever has the mark and is left."""
    worker, server = (processes.noted(machine.file(f"{name}.pid")) for name in ("worker", "server"))
    left = processes.marked(machine.root)
    if not left:
        return "nothing of this checkout is up"
    if worker:
        worker.suspend()  # else it starts the next run that waits
    # the flow's own process first: it ends its stages itself and says so; then what it could not end
    processes.end([run[0] for run in processes.runs_of(machine.root).values()], GRACE)
    processes.end([one for run in processes.runs_of(machine.root).values() for one in run], 1)
    if worker:
        worker.resume()
    if server and healthy(machine):
        reconcile(machine)
    killed = [one for group in ([worker], [server], processes.marked(machine.root)) for one in processes.end(filter(None, group), GRACE)]
    for name in ("worker", "server"):
        machine.file(f"{name}.pid").unlink(missing_ok=True)
    rest = processes.marked(machine.root)
    if rest:
        raise ValueError(f"these survived SIGKILL and wait for the kernel: {', '.join(str(one.pid) for one in rest)}; look with ps")
    more = f", {len(killed)} of them by SIGKILL" if killed else ""
    return f"stopped: {len(left)} processes{more}"


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]](sys.argv[2:])
