"""How `cf wandb sync` calls W&B's own `sync`, and what it makes of its answers: with a `wandb` of ours in its place."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import offline
import pytest

from tasks.wandb_log import sync as wandb_sync
from tests.once import made_once
from tests.preloaded import python_folder

SECRET = "5ec2e7" * 7


def prepare(root: Path) -> Path:
    """A project whose teacher has something to read."""
    (root / "data/latents").mkdir(parents=True)
    (root / "data/latents/a").write_text("latents")
    return offline.project(root)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepare(tmp_path))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return tmp_path


def wandb_that(does: str, place: Path) -> str:
    """A `wandb` of ours, found before the real one: notes how it was called."""
    (place / "wandb").mkdir(parents=True)
    settings = "N(settings=N(base_url=os.environ['WANDB_BASE_URL']))"
    (place / "wandb/__init__.py").write_text(f"import os\nfrom types import SimpleNamespace as N\nsetup = lambda: {settings}\n")
    (place / "wandb/__main__.py").write_text(
        "import json, os, sys, pathlib, time\n"
        f"with open({str(place / 'calls')!r}, 'a') as file: file.write(json.dumps([sys.argv[1:], os.environ['WANDB_MODE']]) + '\\n')\n"
        f"{does}\n"
    )
    return str(place)


SENDS = "[file.with_name(file.name + '.synced').touch() for file in pathlib.Path(sys.argv[2]).glob('*.wandb')]"


def calls(place: str) -> list[Any]:
    file = Path(place) / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def sync(here: Path, place: str, server: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """As `cf wandb sync`, with another `wandb` than the real one before it on the path."""
    environment = offline.environment(WANDB_API_KEY=SECRET, WANDB_BASE_URL=server, **more)
    environment["PYTHONPATH"] = f"{place}:{environment['PYTHONPATH']}"
    command = [python_folder() / "python", "-m", "tasks", "wandb", "sync", *words]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def server() -> Iterator[str]:
    """Something that listens; what is sent to a W&B server is W&B's own affair."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def make_two_runs(root: Path) -> None:
    prepare(root)
    for _ in range(2):
        assert offline.stage(root, "teacher", "models/teacher", "out.mkdir(parents=True); return {}").returncode == 0


def two_runs(here: Path) -> list[wandb_sync.LocalRun]:
    """Copies of two that W&B has written: what is tried here begins when they lie there."""
    shutil.copytree(made_once("two-runs", make_two_runs) / "runtime", here / "runtime", symlinks=True)
    runs = wandb_sync.list_runs(here)
    assert [run.state for run in runs] == ["waits", "waits"]
    return runs


def test_runs_are_sent_once_in_the_order_they_started(here: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = two_runs(here)
    place = wandb_that(SENDS, tmp_path_factory.mktemp("path"))
    done = sync(here, place, server)
    assert done.returncode == 0, done.stderr
    assert calls(place) == [[["sync", str(run.folder)], "online"] for run in (first, second)]
    assert [run.state for run in wandb_sync.list_runs(here)] == ["sent", "sent"]
    assert sync(here, place, server).stdout == "0 runs wait to be sent\n" and len(calls(place)) == 2


def test_wandbs_mark_decides_not_its_exit_code(here: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    two_runs(here)
    place = wandb_that(f"{SENDS}\nsys.exit(1)", tmp_path_factory.mktemp("path"))
    assert sync(here, place, server).returncode == 0 and len(calls(place)) == 2
    assert [run.state for run in wandb_sync.list_runs(here)] == ["sent", "sent"]


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (f"print('wandb: ERROR {SECRET} is refused'); sys.exit(1)", "was not sent: ERROR WANDB_API_KEY is refused"),
        ("print('wandb: done')", "was not sent: done"),  # exit code 0, and nothing was sent
    ],
)
def test_one_that_is_refused_holds_up_no_other(
    here: Path, server: str, does: str, says: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Deleted on the server, say: the next one goes, and the exit code tells of the first."""
    first, second = two_runs(here)
    does = f"if sys.argv[2] == {str(first.folder)!r}: {does}\nelse: {SENDS}"
    place = wandb_that(does, tmp_path_factory.mktemp("path"))
    done = sync(here, place, server)
    assert done.returncode == 1 and says in done.stderr and SECRET not in done.stderr + done.stdout
    assert f"sent       {second.id}" in done.stdout
    assert [run.state for run in wandb_sync.list_runs(here)] == ["waits", "sent"]


def test_one_that_takes_too_long_ends_it(here: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    two_runs(here)
    place = wandb_that("time.sleep(60)", tmp_path_factory.mktemp("path"))
    done = sync(here, place, server, "--timeout", "2")
    assert done.returncode == 1 and "was not sent within 2 s" in done.stderr and "2 runs wait" in done.stderr
    assert len(calls(place)) == 1, "the others would not go either"
    assert [run.state for run in wandb_sync.list_runs(here)] == ["waits", "waits"]


def test_a_server_that_goes_away_ends_it(here: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone after the first run was tried: the second is not."""
    waiting, said = two_runs(here), iter([None, "gone"])
    monkeypatch.setattr(wandb_sync, "explain_unreachable", lambda: next(said))
    monkeypatch.setattr(wandb_sync.LocalRun, "command", [sys.executable, "-c", ""])
    assert wandb_sync.send_runs(waiting, 60) == 2 and next(said, "asked twice") == "asked twice"


def test_the_server_of_wandb_login(here: Path, tmp_path: Path) -> None:
    """`wandb login --host` writes its address into W&B's own settings."""
    two_runs(here)
    config = tmp_path / "home/.config/wandb"
    config.mkdir(parents=True)
    (config / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    gone = {"HOME": str(tmp_path / "home"), "WANDB_CONFIG_DIR": str(config)}
    environment = offline.environment(WANDB_API_KEY=SECRET, **gone)
    command = [sys.executable, "-m", "tasks", "wandb", "sync"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "127.0.0.1 can't be reached" in done.stderr


def test_without_a_connection_it_says_so_at_once(here: Path) -> None:
    two_runs(here)
    began = time.monotonic()
    done = sync(here, wandb_that("", here / "path"), "http://127.0.0.1:9")
    assert done.returncode == 1 and "127.0.0.1 can't be reached" in done.stderr and "2 runs wait" in done.stderr
    assert time.monotonic() - began < 30, "W&B itself tries for hours"


def test_runs_of_the_hour_that_comes_twice_keep_their_order(here: Path) -> None:
    """The night on which clocks are set back: `encode` ran at the first 2:50, `teacher`, which uses its latents, at the second 2:10."""
    for place, name in enumerate(("20261025_025000-encode", "20261025_021000-teacher")):
        folder = here / f"runtime/wandb/offline-run-{name}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000.0 + place, 1000.0 + place))
    assert [run.id for run in wandb_sync.list_runs(here)] == ["encode", "teacher"]


def test_two_syncs_at_once(here: Path) -> None:
    refused = pytest.raises(RuntimeError, match="another `cf wandb sync` is at work")
    with wandb_sync.hold_sync_lock(here), refused, wandb_sync.hold_sync_lock(here):
        pass


def test_worktrees_below_runs_are_looked_through(here: Path) -> None:
    inner = here / ".runs/nightly-1"
    inner.mkdir(parents=True)
    offline.project(inner)
    assert offline.stage(inner, "encode", "data/latents", "out.mkdir(parents=True); return {}").returncode == 0
    (run,) = wandb_sync.list_runs(here)
    assert run.folder.is_relative_to(inner / "runtime/wandb") and run.state == "waits"
