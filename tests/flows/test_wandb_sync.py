"""`cf wandb sync` with W&B's own client: runs are sent once, of killed ones what there is, living ones are left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import offline
import pytest

from tasks.wandb_log import sync
from tasks.wandb_log.run import MARK
from tests.flows import wandb_server
from tests.preloaded import python_folder

SECRET = "5ec2e7" * 7
STAGE = """
track.log(10, loss=0.5); track.log(20, loss=0.25)
track._mirror.show(20, {"samples/0": Path("given.mp4")}, {"samples/0": ""}) if Path("given.mp4").exists() else None
Path("reached").write_text("")
time.sleep(120)
"""


def start(root: Path, **more: str) -> subprocess.Popen[bytes]:
    """A stage that has logged two rows and waits."""
    code = offline.STAGE.replace("BODY", textwrap.indent(STAGE.strip(), "    "))
    (root / "reached").unlink(missing_ok=True)
    command = [sys.executable, "-c", code, "teacher", "offline", "models/teacher"]
    process = subprocess.Popen(command, cwd=root, env=offline.environment(**more))
    for _ in range(600):
        if (root / "reached").exists():
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the stage did not come to its second row in a minute")


def cf(root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [python_folder() / "python", "-m", "tasks", "wandb", *words]
    return subprocess.run(command, cwd=root, env=offline.environment(**more), capture_output=True, text=True, timeout=180)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "data/latents").mkdir(parents=True)
    (tmp_path / "data/latents/a").write_text("latents")
    monkeypatch.chdir(offline.project(tmp_path))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    yield tmp_path


def test_a_living_run_is_left_alone(here: Path) -> None:
    """And one that was killed in its first seconds, of which W&B has not one record, isn't sent either: W&B's `sync` would fail."""
    process = start(here)
    (living,) = sync.list_runs(here)
    assert living.state == "runs" and "0 runs wait" in cf(here, "sync").stdout
    process.kill()
    process.wait()
    file = living.folder / f"run-{living.id}.wandb"
    file.write_bytes(file.read_bytes()[: sync.HEADER_BYTES])  # W&B writes its first record some seconds after the start
    assert living.state == "empty" and offline.history(living.folder) == []
    assert "0 runs wait" in cf(here, "sync").stdout
    file.write_bytes(b"more than a header")
    done = cf(here, "sync", "--dry-run")
    assert done.stdout == f"{living.id}: wandb sync {living.folder}\n1 run waits to be sent\n"
    header, row = cf(here, "list").stdout.splitlines()
    assert header.split() == ["state", "started", "id"] and row.split() == ["killed", living.start, living.id]


def test_a_run_that_is_being_made_is_left_alone(here: Path) -> None:
    """From before W&B makes its folder: what is sent then would lack all that comes later, and count as sent."""
    look = "[one.state for one in sync.list_runs(Path.cwd())]"
    really = f"""
from tasks.wandb_log import sync
from tasks.wandb_log.run import MARK
really = mirror.open_run
def watched(about, mode):
    run = really(about, mode)
    Path("states").write_text(str({look}))
    return run
mirror.open_run = watched
stage, wandb = """
    code = offline.STAGE.replace("BODY", "    out.mkdir(parents=True); return {}").replace("stage, wandb = ", really)
    command = [sys.executable, "-c", code, "teacher", "offline", "models/teacher"]
    assert subprocess.run(command, cwd=here, env=offline.environment(), timeout=120).returncode == 0
    assert (here / "states").read_text() == "['runs']"
    assert [run.state for run in sync.list_runs(here)] == ["waits"] and not list(here.glob(f"runtime/wandb/{MARK}*"))


def test_what_wandbs_own_client_sends(here: Path) -> None:
    """A stage that ended, one that was killed and continued: by W&B's own `sync` to a server of ours. Group, rows, lineage; the key
    only where it belongs; a second time nothing."""
    write = "out.mkdir(parents=True, exist_ok=True); (out / 'b').write_text('b'); return {'psnr': 28.5}"
    assert offline.stage(here, "encode", "data/latents", write).returncode == 0
    process = start(here)
    process.kill()
    process.wait()
    goes_on = "track.resumed(20); out.mkdir(parents=True); return {}"
    assert offline.stage(here, "teacher", "models/teacher", goes_on).returncode == 0
    with wandb_server.serving() as server:
        keyed = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": server.url}
        done = cf(here, "sync", "--timeout", "100", **keyed)
        assert done.returncode == 0 and done.stdout.count("sent       ") == 2, done.stdout + done.stderr
        said = len(server.said)
        assert cf(here, "sync", **keyed).stdout == "0 runs wait to be sent\n" and len(server.said) == said
    encode, _, teacher = (run.id for run in sync.list_runs(here))
    started = {call["name"]: call for call in server.named("UpsertBucket") if call["groupName"]}
    assert {name: (call["groupName"], call["jobType"]) for name, call in started.items()} == {
        encode: ("nightly-7", "encode"),
        teacher: ("nightly-7", "teacher"),
    }
    assert [(row["step"], row["loss"]) for row in server.history[teacher] if "loss" in row] == [(10, 0.5), (20, 0.25)]
    made = {(call["input"]["runName"], call["input"]["artifactCollectionName"]): call["input"] for call in server.named("CreateArtifact")}
    # no run is named as the maker of what it only used; W&B's client sends one run's artifacts side by side, in any order
    assert set(made) == {(None, "clips"), (encode, "latents"), (None, "latents"), (teacher, "teacher")}
    latents = made[encode, "latents"]["digest"]
    assert made[None, "latents"]["digest"] == latents and made[None, "latents"]["enableDigestDeduplication"]
    used = [(call["input"]["runName"], call["input"]["artifactID"]) for call in server.named("UseArtifact")]
    assert sorted(used) == sorted([(encode, made[None, "clips"]["digest"]), (teacher, latents)])
    assert not any(SECRET.encode() in body for body in server.said), "the key is in a header, and nowhere else"


def test_online(here: Path) -> None:
    """By the environment alone. What was sent as it went is not sent again, and the page that shows it is known."""
    with wandb_server.serving() as server:
        keyed = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        body = "track.log(1, loss=0.5); out.mkdir(parents=True); (out / 'w').write_text('w'); return {'loss': 0.5}"
        done = offline.stage(here, "teacher", "models/teacher", body, **keyed)
        assert done.returncode == 0 and "W&B did not" not in done.stderr, done.stderr
        assert cf(here, "sync", **keyed).stdout == "0 runs wait to be sent\n"
    (run,) = sync.list_runs(here)
    assert [row["loss"] for row in server.history[run.id] if "step" in row] == [0.5]
    assert sorted(call["input"]["artifactCollectionName"] for call in server.named("CreateArtifact")) == ["latents", "teacher"]
    assert [call["input"]["runName"] for call in server.named("UseArtifact")] == [run.id]
    url = json.loads((here / "runtime/teacher.json").read_text())["wandb_url"]
    assert url.startswith(server.url) and url.endswith(run.id)


def test_a_server_that_goes_away(here: Path) -> None:
    """In the middle of a run: the stage ends, soon, and all of it is sent by the server's return."""
    body = """
        track.log(1, loss=0.5)
        Path("go").touch()
        while Path("go").exists(): time.sleep(0.1)
        track.log(2, loss=0.25)
        out.mkdir(parents=True)
        return {}
    """
    code = offline.STAGE.replace("BODY", textwrap.indent(textwrap.dedent(body).strip(), "    "))
    code = code.replace("stage, wandb = ", "mirror.FINISH_SECONDS = 3\nstage, wandb = ")
    with wandb_server.serving() as server:
        keyed = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        command = [sys.executable, "-c", code, "teacher", "offline", "models/teacher"]
        process = subprocess.Popen(command, cwd=here, env=offline.environment(**keyed))
        while not (here / "go").exists():
            assert process.poll() is None
            time.sleep(0.1)
    (here / "go").unlink()
    assert process.wait(timeout=120) == 0
    (run,) = sync.list_runs(here)
    assert run.state == "waits"
    with wandb_server.serving() as server:
        done = cf(here, "sync", "--timeout", "60", **keyed | {"WANDB_BASE_URL": server.url})
        assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in server.history[run.id] if "loss" in row] == [0.5, 0.25]
