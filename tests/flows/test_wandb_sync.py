"""`cf wandb sync`: a stage that was really killed is completed, runs are sent once, living ones are left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import offline
import pytest
from evaluate.project import write_mp4

from flows import wandb_sync
from tests.flows import wandb_server
from tests.preloaded import python_folder

SECRET = "5ec2e7" * 7
STAGE = """
track.log(10, loss=0.5); track.log(20, loss=0.25)
track._mirror.show(20, {"samples/0": Path("given.mp4")}) if Path("given.mp4").exists() else None
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


def test_a_killed_run_is_completed(here: Path) -> None:
    """kill -9 some seconds after two rows: W&B's file has not one record. Afterwards it has them all, and who made them."""

    write_mp4(here / "given.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    process = start(here)
    (living,) = wandb_sync.runs(here)
    assert living.state == "runs" and "0 runs wait" in cf(here, "sync", "--complete").stdout
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed,) = wandb_sync.runs(here)
    assert killed.state == "killed" and offline.history(killed.folder) == []
    done = cf(here, "sync", "--complete")
    assert done.returncode == 0 and f"completed  {killed.about['id']}: 3 rows of a run that was killed" in done.stdout, done.stderr
    (run,) = wandb_sync.runs(here)
    assert run.state == "waits" and run.about["id"] == killed.about["id"] and run.folder != killed.folder
    rows = offline.history(run.folder)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(10, 0.5), (20, 0.25)]
    logged = [row["_timestamp"] for row in rows]
    assert logged == sorted(logged) and logged[0] < time.time() - 0.5, "when they were logged, not when they were completed"
    assert any("samples/0._type" in row for row in rows) and len(list(run.folder.rglob("*.mp4"))) == 1
    (about,) = offline.records(run.folder, "run")
    assert about["run_group"] == "nightly-7" and "completed from metrics.jsonl" in about["tags"]
    (used,) = offline.records(run.folder, "artifact")
    assert used["name"] == "latents" and used["use_after_commit"]
    assert offline.summary(run.folder)["exit_code"] == 137
    aside = killed.folder.with_name(f"killed-{killed.folder.name}")
    assert aside.exists() and not killed.folder.exists(), "wandb's own sync would send both"
    before = sorted((here / "runtime").rglob("*"))
    assert "1 runs wait" in cf(here, "sync", "--complete").stdout
    assert sorted((here / "runtime").rglob("*")) == before, "a second time it finds nothing to do"


def test_one_that_was_online_is_completed_beside_what_the_server_has(here: Path) -> None:
    """And an input that has changed since is not said to be its input."""
    with wandb_server.serving() as server:
        process = start(here, WANDB_MODE="online", WANDB_API_KEY=SECRET, WANDB_BASE_URL=server.url)
        process.kill()
        process.wait()
    (killed,) = wandb_sync.runs(here)
    (here / "data/latents/a").write_text("other latents")
    assert cf(here, "sync", "--complete").returncode == 0
    (run,) = wandb_sync.runs(here)
    assert run.about["id"] == f"{killed.about['id']}-whole" and run.state == "waits"
    assert len(offline.history(run.folder)) == 2 and offline.records(run.folder, "artifact") == []


def test_the_rows_matter_more_than_the_rest(here: Path) -> None:
    """After an upgrade dvc.yaml asks for a parameter that the run did not have. And a completion that is killed is done again: at
    each of its steps nothing is lost and no two folders have one id."""
    write_mp4(here / "given.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    process = start(here)
    process.kill()
    process.wait()
    Path("dvc.yaml").write_text("stages: {teacher: {cmd: '${start.new}', deps: [data/latents]}}")
    (killed,) = wandb_sync.runs(here)
    noted, home = (killed.journal / "run.json").read_text(), here / "runtime/wandb"
    for step in range(3):
        done = cf(here, "sync", "--complete")
        assert done.returncode == 0, done.stderr
        (run,) = wandb_sync.runs(here)
        assert len(offline.history(run.folder)) == 3 and len(list(run.folder.rglob("*.mp4"))) == 1
        assert [folder for folder in home.glob("*run-*") if not folder.name.startswith("killed-")] == [run.folder]
        (run.journal / "run.json").write_text(noted)  # as if the completion had been killed before it was noted,
        if step == 1:  # or before the new folder was put into its place
            shutil.rmtree(run.folder)


def test_the_next_attempt_says_what_it_resumes(here: Path) -> None:
    process = start(here)
    process.kill()
    process.wait()
    assert offline.stage(here, "teacher", "models/teacher", "out.mkdir(parents=True); return {}").returncode == 0
    first, second = offline.journals(here)
    assert second["config"]["resume_of"] == first["id"] and second["config"]["attempt"] == 2
    cf(here, "sync", "--complete")
    assert [run.state for run in wandb_sync.runs(here)] == ["waits", "waits"]


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_wandb_stopped_following_is_completed(changed: bool, here: Path) -> None:
    """Its out is declared if it is still the same."""
    body = """
        import psutil; [child.kill() for child in psutil.Process().children(recursive=True)]
        track.log(1, loss=2.0); track.log(2, loss=1.0)
        out.mkdir(parents=True); (out / "weights").write_text("w")
        return {"loss": 1.0}
    """
    assert offline.stage(here, "teacher", "models/teacher", body).returncode == 0
    (lost,) = wandb_sync.runs(here)
    assert lost.state == "lost"
    if changed:
        (here / "models/teacher/weights").write_text("of a later run")
    cf(here, "sync", "--complete")
    (run,) = wandb_sync.runs(here)
    told = offline.summary(run.folder)
    assert run.state == "waits" and told["exit_code"] == 0 and told["summary"]["loss"] == 1
    assert [one["name"] for one in offline.records(run.folder, "artifact")] == ["latents", *([] if changed else ["teacher"])]


def test_what_wandbs_own_client_sends(here: Path) -> None:
    """A stage that ended, one that was killed: by W&B's own `sync` to a server of ours. Group, rows, lineage; the key only where
    it belongs; a second time nothing."""
    write = "out.mkdir(parents=True, exist_ok=True); (out / 'b').write_text('b'); return {'psnr': 28.5}"
    assert offline.stage(here, "encode", "data/latents", write).returncode == 0
    process = start(here)
    process.kill()
    process.wait()
    with wandb_server.serving() as server:
        keyed = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": server.url}
        done = cf(here, "sync", "--timeout", "100", **keyed)
        assert done.returncode == 0 and done.stdout.count("sent       ") == 2, done.stdout + done.stderr
        said = len(server.said)
        assert cf(here, "sync", **keyed).stdout == "0 runs wait to be sent\n" and len(server.said) == said
    encode, teacher = (run.about["id"] for run in wandb_sync.runs(here))
    started = {call["name"]: call for call in server.named("UpsertBucket") if call["groupName"]}
    assert {name: (call["groupName"], call["jobType"]) for name, call in started.items()} == {
        encode: ("nightly-7", "encode"),
        teacher: ("nightly-7", "teacher"),
    }
    assert [(row["step"], row["loss"]) for row in server.history[teacher] if "loss" in row] == [(10, 0.5), (20, 0.25)]
    made = {(call["input"]["runName"], call["input"]["artifactCollectionName"]): call["input"] for call in server.named("CreateArtifact")}
    # no run is named as the maker of what it only used; W&B's client sends one run's artifacts side by side, in any order
    assert set(made) == {(None, "clips"), (encode, "latents"), (None, "latents")}
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
        shutil.rmtree(here / "runtime/wandb")
        assert cf(here, "sync", **keyed).stdout == "0 runs wait to be sent\n"
    (about,) = offline.journals(here)
    assert [row["loss"] for row in server.history[about["id"]] if "step" in row] == [0.5]
    assert sorted(call["input"]["artifactCollectionName"] for call in server.named("CreateArtifact")) == ["latents", "teacher"]
    assert [call["input"]["runName"] for call in server.named("UseArtifact")] == [about["id"]]
    url = json.loads((here / "runtime/teacher.json").read_text())["wandb_url"]
    assert url.startswith(server.url) and url.endswith(about["id"])


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
    code = code.replace("stage, wandb = ", "mirror.PATIENCE = 3\nstage, wandb = ")
    with wandb_server.serving() as server:
        keyed = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        command = [sys.executable, "-c", code, "teacher", "offline", "models/teacher"]
        process = subprocess.Popen(command, cwd=here, env=offline.environment(**keyed))
        while not (here / "go").exists():
            assert process.poll() is None
            time.sleep(0.1)
    (here / "go").unlink()
    assert process.wait(timeout=120) == 0
    (run,) = wandb_sync.runs(here)
    assert run.state == "waits" and not run.about.get("sent")
    with wandb_server.serving() as server:
        done = cf(here, "sync", "--timeout", "60", **keyed | {"WANDB_BASE_URL": server.url})
        assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in server.history[run.about["id"]] if "loss" in row] == [0.5, 0.25]


def test_a_dry_run_does_nothing_and_the_list_says_what_there_is(here: Path) -> None:
    process = start(here)
    process.kill()
    process.wait()
    before = sorted(here.rglob("*"))
    done = cf(here, "sync", "--dry-run")
    assert "would be completed, then sent\n1 runs wait" in done.stdout
    assert sorted(here.rglob("*")) == before
    header, row = cf(here, "list").stdout.splitlines()
    assert header.split()[:2] == ["state", "stage"] and row.split()[:5] == ["killed", "teacher", "nightly-7", "2", "–"]
