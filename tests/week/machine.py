"""What surrounds the week's project: server and worker, an S3 server that can go away, and someone who listens."""

from __future__ import annotations

import http.server
import json
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import psutil

from flows.machine import processes, programs, settings
from tests.week import project


def until(true: Callable[[], Any], what: str, limit: float) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit, f"not within {limit} s: {what}"
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Machine:
    """`cf up` and `cf down`, and the server's own API."""

    def __init__(self, root: Path, secret: Mapping[str, str]) -> None:
        for name in ("flows", "infra"):
            shutil.copytree(project.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.root, self.port = root, free_port()
        self.environment = project.environment(PYTHONPATH=str(root), CF_PORT=str(self.port), **secret)

    def command(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def up(self) -> str:
        return self.command("flows.machine.up", "up").strip()

    def down(self) -> None:
        self.command("flows.machine.up", "down")

    def server(self) -> psutil.Process:
        found = programs.find_process(settings.Machine(self.root, "127.0.0.1", self.port, 1), "server")
        assert found
        return found

    def flow(self, run: str) -> psutil.Process:
        """The oldest process of a run: the flow's own."""
        return min(processes.find_run_processes(self.root)[run], key=lambda one: one.create_time())

    def deployment(self, name: str) -> str:
        (found,) = [one for one in self.call("/deployments/filter", {}) if one["name"] == name]
        return str(found["id"])

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/api{path}", data, {"content-type": "application/json"})
        for _ in range(60):
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                assert error.code == 503, f"{path}: {error.code} {error.read().decode()[:500]}"  # 503: SQLite is busy
                time.sleep(1)
            except OSError:  # it is being restarted
                time.sleep(0.5)
        raise AssertionError(f"no answer from {path}")


class Store:
    """moto's S3 server with one bucket. It keeps everything in memory, so it is never stopped before the end."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: processes.find_port_holder(self.port), "the S3 server listens", 90)
        options = {"aws_access_key_id": "week", "aws_secret_access_key": "weekweek", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **options).create_bucket(Bucket="week")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Forwarder:
    """The address by which the store is known. Down, nobody answers there, and connections that were open are cut."""

    def __init__(self, port: int) -> None:
        self.behind, self.port = port, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.open: list[socket.socket] = []
        self.up()

    def up(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=(self.listener,), daemon=True).start()

    def down(self) -> None:
        for one in [self.listener, *self.open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.open = []

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                return
            self.open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


class Receiver:
    """Whoever is told. The path of its URL is the secret."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        heard = self.heard

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook/{secrets.token_hex(12)}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
