"""Where a checkout's Prefect server is and what its processes are told: environment variables in, environment variables out."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.machine import processes

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
CORS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # user:password; clients have it as PREFECT_API_AUTH_STRING


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
        local = "127.0.0.1" if self.host in ("0.0.0.0", "localhost", "::") else self.host
        return f"http://[{local}]:{self.port}" if ":" in local else f"http://{local}:{self.port}"

    @property
    def reports(self) -> int:
        """The port of flows/machine/reports.py."""
        return self.port + 1000 if self.port <= 64535 else self.port - 1000

    def file(self, name: str) -> Path:
        return self.folder / name


def here(root: Path | None = None) -> Machine:
    """This checkout's: CF_PORT and CF_HOST (else those of the last time, else 4200 and 127.0.0.1), CF_RUNS (1)."""
    root = (root or Path.cwd()).resolve()
    if not (root / "dvc.yaml").exists():
        raise ValueError(f"{root} has no dvc.yaml; run cf at the root of the project")
    numbers = {}
    for name, default, most in (("CF_PORT", last(root, "port"), 65535), ("CF_RUNS", "1", 64)):
        stated = os.environ.get(name, default)
        if not stated.isdecimal() or not 1 <= int(stated) <= most:
            raise ValueError(f"{name} is {stated!r}; it must be a whole number from 1 to {most}")
        numbers[name] = int(stated)
    if "CF_HOST" in os.environ:
        check_host(os.environ["CF_HOST"], os.environ)
    return Machine(root, os.environ.get("CF_HOST", last(root, "host")), numbers["CF_PORT"], numbers["CF_RUNS"])


def last(root: Path, what: str) -> str:
    """Where the server was when it was started last."""
    file = root / ".machine" / what
    return file.read_text() if file.exists() else {"port": "4200", "host": "127.0.0.1"}[what]


def check_host(host: str, given: Mapping[str, str]) -> None:
    """Whoever reaches the API may run what the deployments run: beyond this machine only with a password."""
    user, _, password = given.get(PASSWORD, "").partition(":")
    if host not in LOOPBACK and not (user and password):
        raise ValueError(f"CF_HOST is {host}, which others can reach; state {PASSWORD}=USER:PASSWORD, or CF_HOST=127.0.0.1")


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
        # its default lets the page of any site, open in a browser here, run commands through the API
        CORS: given.get(CORS, f"{machine.url},http://localhost:{machine.port}"),
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


def healthy(machine: Machine, timeout: float = 3.0) -> bool:
    """Does Prefect answer at the port? Whose it is, the pid file says."""
    try:
        with urllib.request.urlopen(f"{machine.url}/api/health", timeout=timeout) as answer:
            return bool(json.load(answer) is True)
    except (OSError, ValueError):
        return False


def ask(given: Mapping[str, str], path: str, body: Any, timeout: float) -> Any:
    """The API in PREFECT_API_URL, with its password; without Prefect's client, which reads where its server is when it is imported, and
    whose versions may be what is wrong. HTTPError, another OSError or ValueError where there is no answer in JSON."""
    password = given.get("PREFECT_API_AUTH_STRING", "")
    headers = {"Authorization": f"Basic {b64encode(password.encode()).decode()}"} if password else {}
    headers["Content-Type"] = "application/json"
    asked = urllib.request.Request(f"{given['PREFECT_API_URL']}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as answer:
            return json.load(answer)
    except HTTPException as error:  # it speaks something else
        raise ConnectionError(type(error).__name__) from None
