"""Processes of one machine: found again after a restart, and ended with all that they started."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from flows.supervise import guardian

MARK = "CF_MACHINE"  # in the environment of the server, the worker and everything below them: the checkout they belong to
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


def note(file: Path, pid: int) -> None:
    """A pid alone may be somebody else's tomorrow."""
    whole = file.with_suffix(".partial")
    whole.write_text(json.dumps({"pid": pid, "began": guardian.began(pid)}))
    whole.replace(file)


def noted(file: Path) -> psutil.Process | None:
    """The process that a pid file names, if it still runs."""
    try:
        stated = json.loads(file.read_text())
        process = psutil.Process(stated["pid"])
        return process if guardian.began(process.pid) == stated["began"] and runs(process) else None
    except (FileNotFoundError, ValueError, KeyError, *GONE):
        return None


def runs(process: psutil.Process) -> bool:
    """A zombie doesn't: in a container nobody may ever collect it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except GONE:
        return False


def marked(root: Path) -> list[psutil.Process]:
    """Everything that the machine of this checkout started, also what left its session or lost its parents; not this process."""
    own = {os.getpid(), *(above.pid for above in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in own and process.environ().get(MARK) == str(root) and runs(process):
                found.append(process)
        except GONE:
            continue
    return found


def runs_of(root: Path) -> dict[str, list[psutil.Process]]:
    """Flow run id -> the flow's own process, which Prefect gives the id, and what that starts with its whole environment: no stages."""
    found: dict[str, list[psutil.Process]] = {}
    for process in marked(root):
        try:
            run = process.environ().get("PREFECT__FLOW_RUN_ID")
        except GONE:
            continue
        if run:
            found.setdefault(run, []).append(process)
    return found


def end(processes: Iterable[psutil.Process], grace: float) -> list[psutil.Process]:
    """SIGTERM, `grace` seconds, SIGKILL. Those that had to be killed are returned."""
    asked = []
    for process in processes:
        try:
            process.terminate()
            asked.append(process)
        except GONE:
            continue
    left = _left(asked, grace)
    for process in left:
        try:
            process.kill()
        except GONE:
            continue
    _left(left, 5)  # the kernel takes its time with many GiB
    return left


def _left(processes: list[psutil.Process], within: float) -> list[psutil.Process]:
    """Those that still run after so many seconds; at once when none does."""
    deadline = time.monotonic() + within
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def holder(port: int) -> str | None:
    """Who has a port of 127.0.0.1, as a person would look for it; None when it is free."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
            return None
        except OSError:
            pass
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"process {one.pid} ({' '.join(psutil.Process(one.pid).cmdline())[:80]})"
    except GONE:
        pass
    return "a process of another user"
