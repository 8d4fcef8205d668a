"""`cf up`, `cf down`: one machine's Prefect server and worker, on 127.0.0.1, with all their files in .machine/.

Beside them run a watch, which sends an alert when nights don't happen and needs neither of the two, and the reports that links in
Prefect's UI open. supervisor restarts what dies (flows/machine/programs.py); `make up` from cron brings back supervisor itself.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from xmlrpc.client import Fault

import psutil
from filelock import FileLock, Timeout

from flows.machine import alerts, processes, programs, settings
from flows.machine.settings import Machine, is_healthy, process_environment, read_machine
from tasks.files.options import parse_options
from tasks.files.settings import read_settings
from tasks.files.words import count_things

POOL = "cf"
PATIENCE = 600.0  # seconds for a start: 10 on a quiet machine, 200 were seen at a load of 20; a program that ends is noticed at once


def start_machine(argv: list[str]) -> None:
    parse_options("up", argv)
    machine = read_machine()
    with lock_machine(machine):
        states, (secrets, database) = programs.read_states(machine), settings.server_secrets()
        running = {name for name, state in states.items() if state in programs.RUNNING}
        worker_log = machine.file("worker.log")
        log_size = worker_log.stat().st_size if worker_log.exists() else 0
        if states:
            refuse_other_address(machine)
        else:
            prepare_start(machine)
        holder = None if "reports" in running else processes.find_port_holder(machine.reports_port)
        if not states:
            print(f"starting supervisor, and by it server, worker, watch and reports; their logs are in {machine.folder}", flush=True)
            programs.start_supervisor(machine, secrets)
        for name in set(states) - running:  # what supervisor has given up, or a `cf down` that was killed had stopped
            with suppress(Fault):  # supervisor may be about to try again by itself
                programs.connect(machine).startProcess(name, False)
        told = alerts.ALERT_URL in os.environ
        alert = f"a missing night is told to {alerts.ALERT_URL}" if told else f"{alerts.ALERT_URL} isn't set, so it can tell nobody"
        announce(machine, "watch", "the watch is", alert, running)
        if holder:
            print(f"links to reports won't open: port {machine.reports_port} is taken by {holder}", flush=True)
        else:
            announce(machine, "reports", "reports are", f"http://127.0.0.1:{machine.reports_port}/RUN/report.html", running)
        if "server" not in running:
            print("the server is starting, which takes ten seconds on an idle machine", flush=True)
        wait_for(machine, "server", lambda: is_healthy(machine))
        announce(machine, "server", "the server is", f"{database}, log {machine.file('server.log')}", running)
        if "worker" not in running:
            wait_for(machine, "worker", lambda: "started!" in programs.read_log(worker_log, log_size))
        announce(machine, "worker", "the worker is", f"pool {POOL}, {machine.runs} at a time, log {worker_log}", running)
    print(f"the UI is at {machine.url}; `cf deploy` sends deployments there, `cf doctor` looks for what is wrong, `cf down` stops it all")


@contextmanager
def lock_machine(machine: Machine) -> Iterator[None]:
    """Let one `cf up` or `cf down` work at a time; the kernel frees the lock when its holder dies."""
    machine.folder.mkdir(exist_ok=True)
    try:
        with FileLock(machine.file("lock"), timeout=0):
            yield
    except Timeout:
        raise ValueError("another `cf up` or `cf down` of this checkout is at work; wait for it") from None


def refuse_other_address(machine: Machine) -> None:
    """Refuse a CF_PORT or CF_HOST that is not where this checkout's server runs."""
    host, port = settings.read_last_address(machine.root)
    for what, current, wanted in (("port", port, str(machine.port)), ("host", host, machine.host)):
        if current != wanted:
            name = f"CF_{what.upper()}"
            raise ValueError(f"this checkout is up at {what} {current} and {name} is {wanted}; `cf down` first, or leave {name} out")


def prepare_start(machine: Machine) -> None:
    """End what a supervisor that was killed has left, refuse an address that can't be used, and note the address for later commands."""
    settings.refuse_open_host(machine.host, os.environ)
    if orphans := processes.find_marked(machine.root):
        print(f"supervisor had died: ending {count_things(len(orphans), 'process')} that it left", flush=True)
        processes.end_processes(orphans, programs.GRACE)
    if holder := processes.find_port_holder(machine.port):
        raise ValueError(f"port {machine.port} is taken by {holder}; end it, or choose another: CF_PORT={machine.port + 1} make up")
    machine.file("port").write_text(str(machine.port))
    machine.file("host").write_text(machine.host)


def announce(machine: Machine, name: str, subject: str, words: str, running: set[str]) -> None:
    """Print that a program is up, or that it was up already."""
    process = programs.find_process(machine, name)
    number = f" (process {process.pid})" if process else ""
    print(f"{subject} up already{number}" if name in running else f"{subject} up: {words}{number}", flush=True)


def wait_for(machine: Machine, name: str, ready: Callable[[], bool]) -> None:
    """Wait until a program is ready; ValueError with the end of its log as soon as it has died."""
    deadline, log = time.monotonic() + PATIENCE, machine.file(f"{name}.log")
    first = programs.find_process(machine, name)
    while not ready():
        if first is None or programs.find_process(machine, name) != first:  # supervisor may have started it again by now
            last = programs.read_log_tail(log)
            raise ValueError(f"the {name} ended while it started, with: {last}; `cf doctor` checks the versions, {log} has the rest")
        if time.monotonic() > deadline:
            raise ValueError(f"the {name} is not ready after {PATIENCE:.0f} s; see {log}, then `cf down`")
        time.sleep(0.25)


def run_worker(argv: list[str]) -> None:
    """Become Prefect's worker, after the runs of the worker before it, which died, are ended and closed at the server."""
    machine = read_machine()
    while not is_healthy(machine):
        time.sleep(0.5)
    end_runs(machine)
    close_runs(machine)
    links = read_settings().reports or f"http://127.0.0.1:{machine.reports_port}"
    # nine tries, each twice as long after: a server that is away for eight minutes ends no run (five would be one minute)
    env = process_environment(machine) | {"PREFECT_CLIENT_MAX_RETRIES": "8", "CF_REPORTS": links}
    words = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", str(machine.runs)]
    os.execve(sys.executable, [sys.executable, "-m", *words], env)


def end_runs(machine: Machine) -> None:
    """End the processes of flow runs: first the flow's own, which ends its stages and says so, then what it could not end."""
    processes.end_processes([run[0] for run in processes.find_run_processes(machine.root).values()], programs.GRACE)
    processes.end_processes([process for run in processes.find_run_processes(machine.root).values() for process in run], 1)


def close_runs(machine: Machine) -> None:
    """Tell the server of runs that died, in a process of its own, because Prefect reads the server's address when it is imported.

    A server that doesn't answer to that (another password, broken versions) must not keep anything from being started or stopped.
    """
    command = [sys.executable, "-m", "flows.machine.reconcile", str(machine.root)]
    env = process_environment(machine)
    try:
        done = subprocess.run(command, cwd=machine.root, env=env, capture_output=True, text=True, timeout=PATIENCE / 5)
        lines, error = done.stdout, done.returncode and (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as late:
        lines, error = "", f"no answer within {late.timeout:.0f} s"
    print(lines, end="", flush=True)
    if error:
        print(f"warning: runs that died could not all be closed: {error}", flush=True)


def stop_machine(argv: list[str]) -> None:
    parse_options("down", argv)
    machine = read_machine()
    with lock_machine(machine):
        print(stop_everything(machine))


def stop_everything(machine: Machine) -> str:
    """Stop the worker, then its runs while there is a server to tell, then supervisor with all programs, then whatever is left."""
    marked = processes.find_marked(machine.root)
    if not marked:
        return "nothing of this checkout is up"
    if supervisor := programs.connect(machine):
        with suppress(Fault):  # the worker is dead already
            supervisor.stopProcess("worker")  # else it would start the next run that waits
    end_runs(machine)
    if supervisor:
        if is_healthy(machine):
            close_runs(machine)
        processes.end_processes([psutil.Process(supervisor.getPID())], 4 * programs.GRACE)  # it ends one program after the other
    killed = processes.end_processes(processes.find_marked(machine.root), programs.GRACE)
    if survivors := processes.find_marked(machine.root):
        numbers = ", ".join(str(process.pid) for process in survivors)
        raise ValueError(f"these survived SIGKILL and wait for the kernel: {numbers}; look with ps")
    by_force = f", {len(killed)} of them by SIGKILL" if killed else ""
    return f"stopped: {count_things(len(marked), 'process')}{by_force}"


if __name__ == "__main__":
    {"up": start_machine, "down": stop_machine, "worker": run_worker}[sys.argv[1]](sys.argv[2:])
