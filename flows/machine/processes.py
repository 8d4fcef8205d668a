"""Processes of one checkout's machine: found by a mark in their environment, and ended with all that they started."""

import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from flows.supervise.guardian import is_running, read_environments

MARK = "CF_MACHINE"  # in the environment of the server, the worker and everything below them: the checkout they belong to


def find_marked(root: Path) -> list[psutil.Process]:
    """Find all that the machine of a checkout started, also what left its session or lost its parents; not this process or its parents."""
    above = psutil.Process().parents()
    return [process for process, environment in read_environments() if environment.get(MARK) == str(root) and process not in above]


def find_run_processes(root: Path) -> dict[str, list[psutil.Process]]:
    """Map flow run ids to the flow's own process, which Prefect tells the id, and what inherits its environment; stages do not."""
    runs: dict[str, list[psutil.Process]] = {}
    for process in find_marked(root):
        with suppress(psutil.Error):
            if run := process.environ().get("PREFECT__FLOW_RUN_ID"):
                runs.setdefault(run, []).append(process)
    return runs


def end_processes(processes: Iterable[psutil.Process], grace: float) -> list[psutil.Process]:
    """Send SIGTERM, and SIGKILL to what still runs after `grace` seconds; return what had to be killed."""
    remaining = []
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
            remaining.append(process)
    remaining = _wait(remaining, grace)
    for process in remaining:
        with suppress(psutil.Error):
            process.kill()
    _wait(remaining, 5)  # the kernel takes its time with many GiB
    return remaining


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return those that still run after so many seconds; at once when none does."""
    deadline = time.monotonic() + seconds
    while (running := [process for process in processes if is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return running


def find_port_holder(port: int) -> str | None:
    """Name the process that listens at a port of 127.0.0.1, as a person would look for it; None when the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return None
        except OSError:
            pass
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid} ({' '.join(psutil.Process(connection.pid).cmdline())[:80]})"
    return "a process of another user"
