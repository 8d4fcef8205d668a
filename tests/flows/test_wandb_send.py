"""How `cf wandb sync` calls W&B's own `sync`, and what it makes of its answers: with a `wandb` of ours in its place."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import offline
import pytest

from flows import wandb_sync

SECRET = "5ec2e7" * 7


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data/latents").mkdir(parents=True)
    (tmp_path / "data/latents/a").write_text("latents")
    monkeypatch.chdir(offline.project(tmp_path))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return tmp_path


def wandb_that(does: str, place: Path) -> str:
    """A `wandb` of ours, found before the real one: notes how it was called."""
    (place / "wandb").mkdir(parents=True)
    (place / "wandb/__init__.py").write_text("")
    (place / "wandb/__main__.py").write_text(
        "import json, os, sys, pathlib, time\n"
        f"with open({str(place / 'calls')!r}, 'a') as file: file.write(json.dumps([sys.argv[1:], os.environ['WANDB_MODE']]) + '\\n')\n"
        f"{does}\n"
    )
    return str(place)


SENDS = "for file in pathlib.Path(sys.argv[2]).glob('*.wandb'): file.with_name(file.name + '.synced').touch()"


def calls(place: str) -> list[Any]:
    file = Path(place) / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def sync(here: Path, place: str, server: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """As `cf wandb sync`, with another `wandb` than the real one before it on the path."""
    environment = offline.environment(WANDB_API_KEY=SECRET, WANDB_BASE_URL=server, **more)
    environment["PYTHONPATH"] = f"{place}:{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "tasks", "wandb", "sync", *words]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def server() -> Iterator[str]:
    """Something that listens; what is sent to a W&B server is W&B's own affair."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def two_runs(here: Path) -> list[wandb_sync.Run]:
    for _ in range(2):
        assert offline.stage(here, "teacher", "models/teacher", "out.mkdir(parents=True); return {}").returncode == 0
    return wandb_sync.runs(here)


def test_runs_are_sent_once_in_the_order_they_started(here: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = two_runs(here)
    place = wandb_that(SENDS, tmp_path_factory.mktemp("path"))
    done = sync(here, place, server)
    assert done.returncode == 0, done.stderr
    assert calls(place) == [[["sync", str(run.folder)], "online"] for run in (first, second)]
    assert [run.state for run in wandb_sync.runs(here)] == ["sent", "sent"]
    assert sync(here, place, server).stdout == "0 runs wait to be sent\n" and len(calls(place)) == 2


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (f"print('wandb: ERROR {SECRET} is refused'); sys.exit(1)", "was not sent: ERROR WANDB_API_KEY is refused; 2 runs wait"),
        ("print('wandb: done')", "was not sent: done; 2 runs wait"),  # exit code 0, and nothing was sent
        ("time.sleep(60)", "was not sent within 2 s"),
    ],
)
def test_what_was_not_sent_still_waits(here: Path, server: str, does: str, says: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    two_runs(here)
    place = wandb_that(does, tmp_path_factory.mktemp("path"))
    done = sync(here, place, server, "--timeout", "2")
    assert done.returncode == 1 and says in done.stderr and SECRET not in done.stderr + done.stdout
    assert len(calls(place)) == 1, "the others would not go either"
    assert [run.state for run in wandb_sync.runs(here)] == ["waits", "waits"]


def test_without_a_connection_it_says_so_at_once(here: Path) -> None:
    two_runs(here)
    began = time.monotonic()
    done = sync(here, wandb_that("", here / "path"), "http://127.0.0.1:9")
    assert done.returncode == 1 and "127.0.0.1 can't be reached" in done.stderr and "2 runs wait" in done.stderr
    assert time.monotonic() - began < 30, "W&B itself tries for hours"
