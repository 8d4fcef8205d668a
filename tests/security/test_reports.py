"""What the links to reports open: a run's report and nothing else, for this machine only."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.flows import project


@pytest.fixture
def served(tmp_path: Path) -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    (tmp_path / ".runs/a-run-12345678/reports").mkdir(parents=True)
    (tmp_path / ".runs/a-run-12345678/reports/report.html").write_text("<p>of a run</p>")
    (tmp_path / ".runs/a-run-12345678/params.yaml").write_text("seed: 1")
    (tmp_path / "report.html").write_text("outside")
    command = [sys.executable, "-m", "flows.machine.reports", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=project.environment())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    assert {one.laddr.ip for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"} == {"127.0.0.1"}
    yield port
    process.kill()
    process.wait()


def asked(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)  # the path as it is, dots and all
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    said = answer.status, answer.read().decode()
    connection.close()
    return said


def test_a_report_and_nothing_else(served: int) -> None:
    assert asked(served, "/a-run-12345678/report.html") == (200, "<p>of a run</p>")
    code, said = asked(served, "/another-run/report.html")
    assert code == 404 and "cf runs open NAME DIR" in said
    odd = "/ /a-run-12345678/ /a-run-12345678/params.yaml /../report.html /%2e%2e/report.html /./report.html //report.html"
    for path in [*odd.split(), "/a-run-12345678/reports/report.html", "/a-run-12345678/report.html?x=1", "/..%2f..%2fetc/report.html"]:
        assert asked(served, path)[0] == 404, path
    assert asked(served, "/a-run-12345678/report.html", method="POST")[0] == 501


def test_a_page_elsewhere_can_not_read_it_by_another_name(served: int) -> None:
    assert asked(served, "/a-run-12345678/report.html", host=f"evil.example:{served}")[0] == 403
    assert asked(served, "/a-run-12345678/report.html", host="evil.example")[0] == 403
    assert asked(served, "/a-run-12345678/report.html", host=f"localhost:{served}")[0] == 200
