"""Programs of one checkout under supervisor: Prefect's server, the worker, the watch and the reports.

supervisor starts each again within seconds of its death and rotates its log. It listens at a unix socket that only this user opens.
"""

import os
import shlex
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Error, ServerProxy

import jinja2
import psutil
from supervisor.xmlrpc import SupervisorTransport

from flows.machine.settings import DATABASE, PASSWORD, Machine, process_environment

GRACE = 8.0  # seconds between SIGTERM and SIGKILL
LOOK = "900"  # Choice: seconds between two looks of the watch; a night is late after a day
RUNNING = ("RUNNING", "STARTING")  # states, in supervisor's words
SOCKET_PATH = 107 - len(".12345678")  # bytes that Linux takes, less what supervisor appends while it binds

TEMPLATE = Path(__file__).with_name("supervisor.conf.j2")


def read_commands(machine: Machine) -> dict[str, list[str]]:
    """Return the command of each program; all but the server are started without the server's secrets."""
    python = [Path(sys.executable).name, "-m"]  # first in PATH, see process_environment
    untold = ["env", "-u", DATABASE, "-u", PASSWORD, *python]
    return {
        "watch": [*untold, "flows.machine.alerts", "--every", LOOK],
        "reports": [*untold, "flows.machine.reports", str(machine.reports_port)],
        "server": [*python, "prefect", "server", "start", "--host", machine.host, "--port", str(machine.port)],
        "worker": [*untold, "flows.machine.up", "worker"],
    }


def start_supervisor(machine: Machine, secrets: dict[str, str]) -> None:
    """Start supervisor and with it all programs, in a session of its own, so that closing the terminal ends nothing.

    No secret is in its configuration, because programs inherit supervisor's environment.
    """
    socket, config, log = (machine.file(name) for name in ("socket", "supervisor.conf", "supervisor.log"))
    if (length := len(os.fsencode(socket))) > SOCKET_PATH:
        raise ValueError(f"{socket} has {length} bytes, a unix socket's path {SOCKET_PATH} at most; move the checkout to a shorter path")
    commands = {name: shlex.join(words).replace("%", "%%") for name, words in read_commands(machine).items()}
    template = jinja2.Template(TEMPLATE.read_text(), trim_blocks=True, undefined=jinja2.StrictUndefined)
    config.write_text(template.render(commands=commands, grace=round(GRACE)))
    command, env = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(config)], process_environment(machine) | secrets
    with log.open("ab") as out:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=machine.root, env=env, start_new_session=True, **streams)
    while "STOPPED" in read_states(machine).values() or connect(machine) is None:  # STOPPED: not started yet
        if process.poll() is not None:
            raise ValueError(f"supervisor ended while it started, with: {read_log_tail(log)}; see {log}")
        time.sleep(0.1)


def connect(machine: Machine) -> Any:
    """Return supervisor's XML-RPC interface, or None where no supervisor of this checkout runs."""
    transport = SupervisorTransport(None, None, f"unix://{machine.file('socket')}")
    interface = ServerProxy("http://127.0.0.1", transport=transport).supervisor  # the address is not used: the transport has the socket
    try:
        interface.getState()
        return interface
    except (OSError, Error, HTTPException):
        return None


def read_states(machine: Machine) -> dict[str, str]:
    """Return the state of each program, in supervisor's words (RUNNING, BACKOFF, ...); empty where no supervisor runs."""
    interface = connect(machine)
    return {info["name"]: info["statename"] for info in interface.getAllProcessInfo()} if interface else {}


def find_process(machine: Machine, name: str) -> psutil.Process | None:
    """Return the process of a program, or None while it is dead."""
    interface = connect(machine)
    pid = interface.getProcessInfo(name)["pid"] if interface else 0
    try:
        return psutil.Process(pid) if pid else None
    except psutil.Error:
        return None


def read_log(log: Path, start: int | None = None) -> str:
    """Return what a log says from byte `start` on; by default its last 200 kB."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 200_000) if start is None else start if start <= size else 0)  # a log that is shorter now was rotated
        return file.read().decode(errors="replace")


def read_log_tail(log: Path) -> str:
    return " | ".join(line for line in read_log(log).splitlines()[-4:] if line.strip())
