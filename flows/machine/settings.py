"""Settings of a checkout's Prefect server, and the environment that its processes are started with."""

import json
import os
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.machine import processes
from tasks.files.settings import read_settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
CORS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # user:password; clients have it as PREFECT_API_AUTH_STRING


@dataclass(frozen=True)
class Machine:
    """Server and worker of one checkout. Two checkouts can be up at the same time, at different ports."""

    root: Path
    host: str
    port: int
    runs: int  # flow runs at a time

    @property
    def url(self) -> str:
        local = "127.0.0.1" if self.host in ("0.0.0.0", "localhost", "::") else self.host
        return f"http://[{local}]:{self.port}" if ":" in local else f"http://{local}:{self.port}"

    @property
    def reports_port(self) -> int:
        """Port of flows/machine/reports.py: the server's plus 1000, or minus 1000 where there is none so high."""
        return self.port + 1000 if self.port <= 64535 else self.port - 1000

    @property
    def folder(self) -> Path:
        return self.root / ".machine"

    def file(self, name: str) -> Path:
        return self.folder / name


def read_machine() -> Machine:
    """Read this checkout's settings: CF_PORT and CF_HOST, else those of the last start, else 4200 and 127.0.0.1."""
    root, values = Path.cwd().resolve(), read_settings()
    if not (root / "dvc.yaml").exists():
        raise ValueError(f"{root} has no dvc.yaml; run cf at the root of the project")
    if values.host is not None:
        refuse_open_host(values.host, os.environ)
    (root / ".machine").mkdir(exist_ok=True)  # Prefect's home is made in it by whatever imports Prefect, which warns where it can't
    host, port = read_last_address(root)
    return Machine(root, values.host or host, values.port or int(port), values.runs)


def read_last_address(root: Path) -> tuple[str, str]:
    """Return host and port that the server had when it was started last, else the defaults."""
    files = (root / ".machine/host", "127.0.0.1"), (root / ".machine/port", "4200")
    host, port = (file.read_text() if file.exists() else default for file, default in files)
    return host, port


def refuse_open_host(host: str, env: Mapping[str, str]) -> None:
    """Refuse an address beyond this machine without a password, because whoever reaches the API can run what deployments run."""
    user, _, password = env.get(PASSWORD, "").partition(":")
    if host not in LOOPBACK and not (user and password):
        raise ValueError(f"CF_HOST is {host}, which others can reach; state {PASSWORD}=USER:PASSWORD, or CF_HOST=127.0.0.1")


def process_environment(machine: Machine, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of everything that talks to the server, without the secrets that only the server is told."""
    inherited = {name: value for name, value in env.items() if name not in (DATABASE, PASSWORD, "PREFECT_PROFILE")}
    if PASSWORD in env:
        inherited.setdefault("PREFECT_API_AUTH_STRING", env[PASSWORD])
    path = [str(machine.root), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    return inherited | {
        processes.MARK: str(machine.root),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PREFECT_HOME": str(machine.file("prefect")),
        "PREFECT_API_URL": f"{machine.url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Prefect's default lets the page of any site, open in a browser here, run commands through the API
        CORS: env.get(CORS, f"{machine.url},http://localhost:{machine.port}"),
        # Prefect's default holds slots in the server's memory: after a restart they stay taken for ever (docs/operating.md)
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "45",
        "PREFECT_LOGGING_COLORS": "false",
        # Prefect tries a run's first batch of lines only once (a client that never reached the server gives up), and its default of 2 s
        # would put the first stage's lines into that batch: they were lost where the server died just then
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",
    }


def server_secrets(env: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str]:
    """Return the variables that only the server is told, and words for its database that hold no password."""
    secrets = {name: env[name] for name in (DATABASE, PASSWORD) if name in env}
    if not env.get(DATABASE):
        return secrets, "SQLite"
    parts = urlsplit(env[DATABASE])
    if parts.scheme not in ("postgresql+asyncpg", "sqlite+aiosqlite"):
        raise ValueError(f"{DATABASE} begins with {parts.scheme}://; Prefect takes postgresql+asyncpg://USER:PASSWORD@HOST/NAME")
    return secrets, f"Postgres at {parts.hostname}" if parts.hostname else "SQLite"


def is_healthy(machine: Machine) -> bool:
    """Does Prefect answer at the port? Whose server that is, supervisor knows (flows/machine/programs.py)."""
    try:
        with open_url(f"{machine.url}/api/health", timeout=3.0) as answer:
            return bool(json.load(answer) is True)
    except (OSError, ValueError):
        return False


def post_json(env: Mapping[str, str], path: str, body: Any, timeout: float) -> Any:
    """Send a request to the API in PREFECT_API_URL, with its password, and return the JSON answer.

    Prefect's client is not used, because it reads the server's address when it is imported and its version may be what is wrong.
    Raises HTTPError, another OSError or ValueError where no JSON comes back.
    """
    password = env.get("PREFECT_API_AUTH_STRING", "")
    headers = {"Authorization": f"Basic {b64encode(password.encode()).decode()}"} if password else {}
    with open_url(f"{env['PREFECT_API_URL']}{path}", body, timeout=timeout, **headers) as answer:
        return json.load(answer)


@contextmanager
def open_url(url: str, body: Any = None, *, timeout: float, **headers: str) -> Iterator[Any]:
    """POST a body as JSON to a URL, or GET it without a body, and yield the open answer. Raises HTTPError, another OSError, ValueError."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield answer
    except HTTPException as error:  # what listens there speaks another protocol
        raise ConnectionError(type(error).__name__) from None
