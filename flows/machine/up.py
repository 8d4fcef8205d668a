"""`cf up`, `cf down`: one machine's Prefect server and worker, on 127.0.0.1, with all their files in .machine/; a watch that tells when
nights don't happen (the scheduler, the server and the worker may each be why, so it needs none of them); and what the UI's links open.

Starting what runs already does nothing, so a crontab line that says `make up` every five minutes brings back what died.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from flows.machine import alerts, processes
from flows.machine.settings import DATABASE, Machine, check_host, database, environment, healthy, here, last

POOL = "cf"
PATIENCE = 600.0  # seconds for a start: 10 on a quiet machine, 200 were seen at a load of 20; one that died is noticed at once
GRACE = 8.0  # seconds between SIGTERM and SIGKILL
LOG = 50 * 2**20  # Choice: bytes after which a log is set aside when its process is started; the worker's has each line of each stage
LOOK = "900"  # Choice: seconds between two looks of the watch; a night is late after a day


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


# ------------------------------------------------------------------------------------------------------------- up


def up(argv: list[str]) -> None:
    about = "Starts the Prefect server, a worker, the watch and the reports, or what of them doesn't run. CF_PORT, CF_RUNS; " + DATABASE
    argparse.ArgumentParser("cf up", description=about).parse_args(argv)
    machine = here()
    with alone(machine):
        order = [start_server, start_worker, start_reports, start_watch]
        if machine.file("watch.pid").exists():  # nobody took it down; a server that starts no more must not be why nobody is told
            order.insert(0, order.pop())
        for begin in order:
            print(begin(machine), flush=True)
    print("`cf deploy` sends the deployments there, `cf doctor` looks for what is wrong, `cf down` stops it all")


def start_server(machine: Machine) -> str:
    extra, kept = database()
    running, other = (processes.noted(machine.file(f"{name}.pid")) for name in ("server", "worker"))
    for what, asked in (("port", str(machine.port)), ("host", machine.host)):
        name, is_at = f"CF_{what.upper()}", last(machine.root, what)
        if (running or other) and is_at != asked:
            raise ValueError(f"this checkout is up at {what} {is_at} and {name} is {asked}; `cf down` first, or leave {name} out")
    if running is None:
        check_host(machine.host, os.environ)
        if taken := processes.holder(machine.port):
            raise ValueError(f"port {machine.port} is taken by {taken}; end it, or choose another: CF_PORT={machine.port + 1} make up")
        command = ["prefect", "server", "start", "--host", machine.host, "--port", str(machine.port)]
        machine.file("port").write_text(str(machine.port))
        machine.file("host").write_text(machine.host)
        running = launch(machine, "server", command, environment(machine) | extra)
    elif healthy(machine):
        return f"the server is up already: {machine.url} (process {running.pid})"
    wait(machine, "server", running, lambda: healthy(machine))
    return f"the server is up: {machine.url} (process {running.pid}, {kept}, log {machine.file('server.log')})"


def start_worker(machine: Machine) -> str:
    running = processes.noted(machine.file("worker.pid"))
    if running is not None and running.status() == psutil.STATUS_STOPPED:
        running.resume()
        return f"the worker was stopped, by a `cf down` that was killed or by hand, and goes on (process {running.pid})"
    if running is not None:
        return f"the worker is up already (process {running.pid})"
    reconcile(machine)  # runs of a worker that died would say Running for ever
    log = log_of(machine, "worker")
    before = log.stat().st_size if log.exists() else 0
    command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", str(machine.runs)]
    links = {"CF_REPORTS": os.environ.get("CF_REPORTS", f"http://127.0.0.1:{machine.reports}")}
    # nine tries, each twice as long after: a server that is away for eight minutes ends no run (five would be one minute)
    running = launch(machine, "worker", command, environment(machine) | {"PREFECT_CLIENT_MAX_RETRIES": "8"} | links)
    wait(machine, "worker", running, lambda: "started!" in since(log, before))
    return f"the worker is up: pool {POOL}, {machine.runs} at a time (process {running.pid}, log {log})"


def start_watch(machine: Machine) -> str:
    told = f"a missing night is told to {alerts.URL}" if alerts.URL in os.environ else f"{alerts.URL} isn't set, so it can tell nobody"
    return start(machine, "watch", "the watch is", ["flows.machine.alerts", "--every", LOOK], told)


def start_reports(machine: Machine) -> str:
    if not processes.noted(machine.file("reports.pid")) and (taken := processes.holder(machine.reports)):
        return f"links to reports won't open: port {machine.reports} is taken by {taken}"
    words = ["flows.machine.reports", str(machine.reports)]
    return start(machine, "reports", "reports are", words, f"http://127.0.0.1:{machine.reports}/RUN/report.html")


def start(machine: Machine, name: str, it_is: str, words: list[str], said: str) -> str:
    running = processes.noted(machine.file(f"{name}.pid"))
    if running is not None:
        return f"{it_is} up already (process {running.pid})"
    return f"{it_is} up: {said} (process {launch(machine, name, words, environment(machine)).pid})"


def launch(machine: Machine, name: str, words: list[str], env: dict[str, str]) -> psutil.Process:
    """`python -m` in a session of its own, so that closing the terminal ends nothing."""
    with log_of(machine, name).open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=machine.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes.note(machine.file(f"{name}.pid"), child.pid)
    return psutil.Process(child.pid)


def log_of(machine: Machine, name: str) -> Path:
    """With room in it; for a process that isn't up."""
    log = machine.file(f"{name}.log")
    if log.exists() and log.stat().st_size > LOG:
        log.replace(machine.file(f"{name}.log.1"))
    return log


def since(log: Path, place: int | None = None) -> str:
    """What it says after `place`; without one, its end."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 200_000) if place is None else place)
        return file.read().decode(errors="replace")


def wait(machine: Machine, name: str, process: psutil.Process, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        log = machine.file(f"{name}.log")
        if not processes.runs(process):
            last = " | ".join(line for line in since(log).splitlines()[-4:] if line.strip())
            raise ValueError(f"the {name} ended while it started, with: {last}; `cf doctor` checks the versions, {log} has the whole")
        if time.monotonic() > deadline:
            raise ValueError(f"the {name} (process {process.pid}) is not ready after {PATIENCE:.0f} s; see {log}, then `cf down`")
        time.sleep(0.25)


def reconcile(machine: Machine) -> None:
    """In a process of its own: Prefect reads where its server is when it is imported. A server that refuses to hear of it (it has a
    password that nobody stated here, or its versions break it) is no reason to stop or start nothing."""
    command = [sys.executable, "-m", "flows.machine.reconcile", str(machine.root)]
    try:
        done = subprocess.run(command, cwd=machine.root, env=environment(machine), capture_output=True, text=True, timeout=PATIENCE / 5)
        said, why = done.stdout, done.returncode and (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as late:
        said, why = "", f"no answer within {late.timeout:.0f} s"
    print(said, end="", flush=True)
    if why:
        print(f"warning: runs that died could not all be closed: {why}", flush=True)


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
    with asleep(worker):  # else it starts the next run that waits
        # the flow's own process first: it ends its stages itself and says so; then what it could not end
        processes.end([run[0] for run in processes.runs_of(machine.root).values()], GRACE)
        processes.end([one for run in processes.runs_of(machine.root).values() for one in run], 1)
    if server and healthy(machine):
        reconcile(machine)
    killed = [one for group in ([worker], [server], processes.marked(machine.root)) for one in processes.end(filter(None, group), GRACE)]
    for name in ("worker", "server", "watch", "reports"):
        machine.file(f"{name}.pid").unlink(missing_ok=True)
    rest = processes.marked(machine.root)
    if rest:
        raise ValueError(f"these survived SIGKILL and wait for the kernel: {', '.join(str(one.pid) for one in rest)}; look with ps")
    more = f", {len(killed)} of them by SIGKILL" if killed else ""
    return f"stopped: {len(left)} processes{more}"


@contextmanager
def asleep(process: psutil.Process | None) -> Iterator[None]:
    """One that was left so, by Ctrl-C in between, would look well and do nothing for ever."""
    with suppress(*processes.GONE):
        if process:
            process.suspend()
    try:
        yield
    finally:
        with suppress(*processes.GONE):
            if process:
                process.resume()


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]](sys.argv[2:])
