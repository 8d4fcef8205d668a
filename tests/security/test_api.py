"""The Prefect API beyond loopback: not without a password. That the server then refuses whoever has none: tests/infra/test_server.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.machine import settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "", "127.0.0.1.example.org"])
@pytest.mark.parametrize("password", [None, "", ":", "cf:", ":secret", "secret"])
def test_others_are_not_let_in_without_a_password(host: str, password: str | None) -> None:
    given = {} if password is None else {"PREFECT_SERVER_API_AUTH_STRING": password}
    with pytest.raises(ValueError, match="which others can reach; state PREFECT_SERVER_API_AUTH_STRING=") as refused:
        settings.refuse_open_host(host, given)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    settings.refuse_open_host(host, {})


def test_with_a_password_others_may_be_let_in() -> None:
    settings.refuse_open_host("0.0.0.0", {"PREFECT_SERVER_API_AUTH_STRING": "cf:secret"})


def test_up_starts_nothing_then(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    given = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "CF_"))}
    env = given | {"PYTHONPATH": str(ROOT), "CF_HOST": "0.0.0.0"}
    done = subprocess.run([sys.executable, "-m", "tasks", "up"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode and "CF_HOST is 0.0.0.0, which others can reach" in done.stderr
    assert not (tmp_path / ".machine").exists()


def test_the_password_reaches_the_server_and_clients_and_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage has no business with the API; only the server has any with the database."""
    from flows.supervise import environment

    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "cf:secret")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "cf:secret")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://cf:secret@127.0.0.1/prefect")
    monkeypatch.setenv("CF_ALERT_URL", "http://127.0.0.1:9/secret")
    assert "secret" not in str(environment.stage_environment("run", ROOT, ROOT))
    machine = settings.Machine(ROOT, "127.0.0.1", 4200, 1)
    told = settings.process_environment(machine, dict(os.environ))
    assert told["PREFECT_API_AUTH_STRING"] == "cf:secret" and "PREFECT_SERVER_API_AUTH_STRING" not in told
    own, said = settings.server_secrets(dict(os.environ))
    assert own["PREFECT_SERVER_API_AUTH_STRING"] == "cf:secret" and "secret" not in said
