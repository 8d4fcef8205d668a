"""Someone is told, also of what did not happen; and the URL stays a secret."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from flows import nightly
from flows.machine import alerts
from tests.flows import project
from tests.week.machine import Receiver


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    listening = Receiver()
    monkeypatch.setenv(alerts.ALERT_URL, listening.url)
    monkeypatch.setattr(alerts, "PAUSE", 0.0)
    yield listening
    listening.stop()


def test_it_arrives_whole(receiver: Receiver) -> None:
    lines: list[str] = []
    assert alerts.send_alert("refused", "nightly of Monday: no", lines.append, date="2026-01-05")
    (heard,) = receiver.heard
    assert (heard["event"], heard["text"], heard["date"]) == ("refused", "context-forcing: nightly of Monday: no", "2026-01-05")
    assert lines == ["someone was told: refused"]


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9/secretword", "http://secretword.invalid/x", "http://127.0.0.1:9/secretword x"),
        *("file:///etc/secretword", "secretword"),
    ],
)
def test_who_can_not_be_told_ends_nothing_and_betrays_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(alerts.ALERT_URL, url)
    monkeypatch.setattr(alerts, "PAUSE", 0.0)
    monkeypatch.setattr(alerts, "LIMIT", 2.0)
    lines: list[str] = []
    assert not alerts.send_alert("failed", "x", lines.append)
    assert "nobody could be told (failed)" in lines[0] and "secretword" not in "".join(lines)


def test_without_a_url_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(alerts.ALERT_URL, raising=False)
    lines: list[str] = []
    assert not alerts.send_alert("failed", "x", lines.append) and "CF_ALERT_URL is not set" in lines[0]


@pytest.mark.parametrize(("hook", "event"), [(alerts.on_failure, "failed"), (alerts.on_crashed, "crashed")])
def test_hooks_tell_and_write_down(hook: object, event: str, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alerts.record_end(tmp_path, "Promoted", good=True)
    good = json.loads((tmp_path / alerts.STATE_FILE).read_text())["good"]
    assert callable(hook)
    hook(None, SimpleNamespace(id="1", name="a-run"), SimpleNamespace(message="two\nlines"))
    assert receiver.heard[0]["event"] == event and "a-run" in receiver.heard[0]["text"] and "two lines" in receiver.heard[0]["text"]
    state = json.loads((tmp_path / alerts.STATE_FILE).read_text())
    assert state["outcome"] == event and state["good"] == good, "a failure is no good end"


def test_absence_is_seen_without_any_night(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert alerts.report_absence(tmp_path, 26) is None, "time begins with the first question"
    monkeypatch.setattr(alerts.time, "time", lambda: now + 25 * 3600)
    assert alerts.report_absence(tmp_path, 26) is None and not receiver.heard
    monkeypatch.setattr(alerts.time, "time", lambda: now + 27 * 3600)
    assert "for 27.0 hours (none has ever ended)" in (alerts.report_absence(tmp_path, 26) or "")
    assert [one["event"] for one in receiver.heard] == ["absent"]
    assert alerts.report_absence(tmp_path, 26) and len(receiver.heard) == 1, "told once a day, however often cron asks"
    monkeypatch.setattr(alerts.time, "time", lambda: now + 53 * 3600)
    assert alerts.report_absence(tmp_path, 26) and len(receiver.heard) == 2
    alerts.record_end(tmp_path, "NoNewData", good=True)
    assert alerts.report_absence(tmp_path, 26) is None


def test_failures_every_night_are_an_absence(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    alerts.record_end(tmp_path, "Promoted", good=True)
    monkeypatch.setattr(alerts.time, "time", lambda: now + 30 * 3600)
    alerts.record_end(tmp_path, "failed", good=False)
    assert "the last to end was failed" in (alerts.report_absence(tmp_path, 26) or "")


def test_the_command_is_for_cron(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("nightly: {absent_hours: 26.0}\n")
    alerts.main([])
    (tmp_path / alerts.STATE_FILE).write_text(json.dumps({"since": time.time() - 100 * 3600}))
    with pytest.raises(SystemExit, match="no nightly has ended well for 100"):
        alerts.main([])
    assert receiver.heard


def test_the_watch_looks_again_and_survives_a_params_file_that_is_being_edited(receiver: Receiver, tmp_path: Path) -> None:
    params, log = tmp_path / "params.yaml", tmp_path / "log"
    params.write_text("nightly: {absent_hours: ")
    (tmp_path / ".runs").mkdir()
    (tmp_path / alerts.STATE_FILE).write_text(json.dumps({"since": time.time() - 100 * 3600}))
    command = [sys.executable, "-m", "flows.machine.alerts", "--every", "0.05"]
    env = project.environment(PYTHONPATH=str(project.ROOT), CF_ALERT_URL=receiver.url)
    with log.open("w") as file, subprocess.Popen(command, cwd=tmp_path, env=env, stderr=file) as watch:
        try:
            for true in (lambda: "not looked for missing nights" in log.read_text(), lambda: receiver.heard):
                deadline = time.monotonic() + 60
                while not true() and time.monotonic() < deadline:
                    time.sleep(0.02)
                params.write_text("nightly: {absent_hours: 26.0}\n")
            assert watch.poll() is None, log.read_text()
        finally:
            watch.kill()
    assert [one["event"] for one in receiver.heard] == ["absent"]
    assert receiver.url not in log.read_text()


def test_every_good_end_of_a_night_is_known_by_its_name() -> None:
    assert set(nightly.STATE_NAMES.values()) | {"NoNewData", "NotPushed"} == set(alerts.GOOD_OUTCOMES)


def other(answers: list[bytes]) -> tuple[str, list[bytes]]:
    """Someone who answers each call with the next of these."""
    listener, heard = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            heard.append(connection.recv(65536))
            connection.sendall(answer)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/secretword", heard


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 500 secretword\r\nContent-Length: 0\r\n\r\n"])
def test_a_receiver_that_refuses_or_speaks_something_else(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    url, heard = other([answer] * alerts.TRIES)
    monkeypatch.setenv(alerts.ALERT_URL, url)
    monkeypatch.setattr(alerts, "PAUSE", 0.0)
    lines: list[str] = []
    assert not alerts.send_alert("failed", "x", lines.append) and len(heard) == alerts.TRIES
    assert "nobody could be told (failed)" in lines[0] and "secretword" not in "".join(lines)
    monkeypatch.setenv("PREFECT_API_URL", other([answer])[0])
    assert alerts.last_good_end_elsewhere() == 0.0


def test_it_is_told_again_when_it_was_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    url, heard = other([b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n", good])
    monkeypatch.setenv(alerts.ALERT_URL, url)
    monkeypatch.setattr(alerts, "PAUSE", 0.0)
    assert alerts.send_alert("failed", "x", lambda _: None) and len(heard) == 2


def test_a_full_disk_is_told_all_the_same(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".runs").write_text("no folder, so nothing can be written")
    alerts.on_failure(None, SimpleNamespace(id="1", name="x"), SimpleNamespace(message="No space left on device"))
    assert "No space left" in receiver.heard[0]["text"]


@pytest.mark.parametrize("name", ["good", "since"])
def test_a_clock_that_was_ahead_silences_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(alerts.ALERT_URL, raising=False)
    now = time.time()
    (tmp_path / ".runs").mkdir()
    (tmp_path / alerts.STATE_FILE).write_text(json.dumps({name: now + 1e8, "told": now + 1e8}))
    assert alerts.report_absence(tmp_path, 26) is None
    monkeypatch.setattr(alerts.time, "time", lambda: now + 27 * 3600)
    assert "no nightly has ended well for 27.0 hours" in (alerts.report_absence(tmp_path, 26) or "")


class Heart(http.server.BaseHTTPRequestHandler):
    """Answers with the code that its path names, and remembers who asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(int(self.path[1:4]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_heartbeat_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.delenv(alerts.HEARTBEAT_URL, raising=False)
    alerts.send_heartbeat(lines.append)
    assert lines == []
    with http.server.HTTPServer(("127.0.0.1", 0), Heart) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for code in (200, 500):
            monkeypatch.setenv(alerts.HEARTBEAT_URL, f"http://127.0.0.1:{server.server_port}/{code}/secretword")
            alerts.send_heartbeat(lines.append)
        server.shutdown()
    assert Heart.asked == ["/200/secretword", "/500/secretword"], "once each"
    assert lines == ["a heartbeat was sent", "warning: no heartbeat was sent: HTTP 500; see CF_HEARTBEAT_URL"]


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/secretword", "file:///etc/secretword", "secretword", "http://[secretword", "http://127.0.0.1:9/secretword"]
)
def test_a_heartbeat_that_can_not_be_sent_is_a_warning(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond this machine only with TLS, and the address stays a secret."""
    monkeypatch.setenv(alerts.HEARTBEAT_URL, url)
    lines: list[str] = []
    alerts.send_heartbeat(lines.append)
    assert lines[0].startswith("warning: no heartbeat was sent: ") and "secretword" not in lines[0]


def test_a_heart_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "LIMIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(alerts.HEARTBEAT_URL, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        lines: list[str] = []
        alerts.send_heartbeat(lines.append)
    assert "TimeoutError" in lines[0]
