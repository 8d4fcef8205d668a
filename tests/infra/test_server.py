"""What compose.yaml starts, really started without Docker: Prefect's server as stated there, on a real Postgres, with its password;
and a worker as stated there, through the image's entrypoint."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.infra.composed import SECRETS, compose

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
PASSWORD = SECRETS["PREFECT_AUTH"]
FLOW = """from pathlib import Path

from prefect import flow


@flow
def small(word: str = "nothing") -> str:
    Path("said.txt").write_text(word)
    return word
"""
pytestmark = pytest.mark.skipif(shutil.which("initdb", path=PATHS) is None, reason="Postgres is not installed (apt-get install postgresql)")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait(ready: Callable[[], object], seconds: float, what: str, log: Path) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"waited {seconds} s for {what}:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """A database of its own, in a folder of its own; it refuses to be root."""
    stated = compose()["services"]["postgres"]["environment"]
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp(prefix="cf-postgres-")), free_port()
    folder.chmod(0o777)
    (folder / "password").write_text(stated["POSTGRES_PASSWORD"])
    (folder / "password").chmod(0o644)
    words = ["--username", stated["POSTGRES_USER"], "--auth", "scram-sha-256", "--pwfile", str(folder / "password")]
    environment = {"PATH": PATHS, "LC_ALL": "C"}
    initdb = ["initdb", "--pgdata", str(folder / "data"), "--no-sync", *words]
    subprocess.run(initdb, env=environment, cwd=folder, check=True, capture_output=True, **user)
    run = ["postgres", "-D", str(folder / "data"), "-c", "listen_addresses=127.0.0.1", "-p", str(port), "-k", str(folder)]
    try:
        with running(run, folder / "log", env=environment, cwd=folder, **user) as process:
            asked = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", stated["POSTGRES_USER"], "-d", "postgres", "-qc"]
            known = environment | {"PGPASSWORD": stated["POSTGRES_PASSWORD"]}
            make = [*asked, f"create database {stated['POSTGRES_DB']}"]
            wait(lambda: subprocess.run(make, env=known, capture_output=True).returncode == 0, 60, "Postgres", folder / "log")
            yield port
            process.send_signal(2)  # does not wait for clients
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """The service `server`, with this machine's addresses in the place of the containers'."""

    def __init__(self, folder: Path, database: int) -> None:
        self.port, self.folder, self.log = free_port(), folder, folder / "server.log"
        self.url = f"http://127.0.0.1:{self.port}/api"
        service = compose()["services"]["server"]
        words = [word.replace("0.0.0.0", "127.0.0.1").replace("4200", str(self.port)) for word in service["command"]]
        self.command = [sys.executable, "-m", *words]
        stated = {key: value.replace("@postgres:5432", f"@127.0.0.1:{database}") for key, value in service["environment"].items()}
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5", **stated}

    @contextmanager
    def up(self) -> Iterator[subprocess.Popen[bytes]]:
        with running(self.command, self.log, env=self.env, cwd=self.folder) as process:
            wait(lambda: process.poll() is not None or self.status("health") == 200, 240, "the server", self.log)
            yield process

    def status(self, path: str, password: str | None = None) -> int:
        return self.ask("GET", path, password=password).status_code

    def ask(self, verb: str, path: str, body: object = None, password: str | None = PASSWORD) -> requests.Response:
        headers = {} if password is None else {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}
        try:
            return requests.request(verb, f"{self.url}/{path}", json=body, headers=headers, timeout=20)
        except requests.ConnectionError:
            nothing = requests.Response()
            nothing.status_code = 0
            return nothing


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a worker's container would clone."""
    folder = tmp_path_factory.mktemp("project") / "origin"
    folder.mkdir()
    (folder / "small.py").write_text(FLOW)
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], ["commit", "--quiet", "--message", "."]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_the_composed_server_and_worker_on_a_real_postgres(postgres: int, tmp_path: Path, project: Path) -> None:
    server = Server(tmp_path, postgres)
    with server.up() as process:
        refused_without_a_password(server)
        deployment = deployed(server, tmp_path)
        run = worked(server, tmp_path, project, deployment)
        scheduled = {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
        wait(lambda: server.ask("POST", "flow_runs/count", scheduled).json() > 0, 60, "the cron's runs", server.log)
        process.kill()
        process.wait()
    with server.up():
        kept = server.ask("GET", f"flow_runs/{run}").json()
        assert kept["state"]["type"] == "COMPLETED", "Postgres has kept it"
    said = server.log.read_text()
    assert " ERROR " not in said, said[-3000:]
    for secret in SECRETS.values():
        assert secret not in said


def refused_without_a_password(server: Server) -> None:
    """All but the health check, whatever is asked."""
    for verb, path in (("POST", "flow_runs/filter"), ("POST", "deployments/"), ("GET", "admin/settings"), ("GET", "admin/version")):
        for password in (None, "cf:wrong", "cf:", "", PASSWORD.upper()):
            assert server.ask(verb, path, {}, password).status_code == 401, (verb, path, password)
    assert server.ask("POST", "flow_runs/filter", {}).status_code == 200
    assert server.status("health") == 200
    told = server.ask("GET", "admin/settings").text
    assert SECRETS["POSTGRES_PASSWORD"] not in told and PASSWORD not in told


def client(server: Server, folder: Path) -> dict[str, str]:
    stated = compose()["services"]["worker"]["environment"]
    keep = {key: value for key, value in stated.items() if not key.startswith("AWS_ENDPOINT")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(folder), **keep, "PREFECT_API_URL": server.url}


def deployed(server: Server, folder: Path) -> str:
    home = folder / "context-forcing"
    flow = server.ask("POST", "flows/", {"name": "small"}).json()["id"]
    assert server.ask("POST", "work_pools/", {"name": "cf", "type": "process"}).status_code == 201
    made = server.ask(
        "POST",
        "deployments/",
        {
            "name": "small",
            "flow_id": flow,
            "work_pool_name": "cf",
            "entrypoint": "small.py:small",
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(home)}}],
            "schedules": [{"schedule": {"cron": "0 2 * * *", "timezone": "UTC"}, "active": True}],
        },
    )
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def worked(server: Server, folder: Path, project: Path, deployment: str) -> str:
    """A run, done by the service `worker` in a checkout that its entrypoint made."""
    log = folder / "worker.log"
    environment = client(server, folder) | {"CF_REPOSITORY": str(project)}
    command = [str(ROOT / "infra/entrypoint.sh"), "prefect", "worker", "start", "--pool", "cf", "--type", "process", "--limit", "1"]
    with running(command, log, env=environment, cwd=folder):
        asked = server.ask("POST", f"deployments/{deployment}/create_flow_run", {"parameters": {"word": "well"}})
        run = str(asked.json()["id"])
        wait(lambda: server.ask("GET", f"flow_runs/{run}").json()["state"]["type"] == "COMPLETED", 180, "the run", log)
    assert (folder / "context-forcing/said.txt").read_text() == "well"
    return run
