"""How a remote is set up, what is refused in one sentence, and the push as a task of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State

from flows.project import dvc_remote
from tests.flows.s3 import CREDENTIALS, source


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("setup") / "origin")


@pytest.fixture
def root(empty: Path, tmp_path: Path) -> Path:
    """A project without a remote."""
    subprocess.run(["cp", "-r", str(empty), str(tmp_path / "project")], check=True)
    return tmp_path / "project"


def state(root: Path, text: str, file: str = "config") -> None:
    (root / ".dvc" / file).write_text(text)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_remote_is_verified_and_has_time_limits(root: Path) -> None:
    dvc_remote.add_remote(root, "lab", "s3://bucket/cf", endpoint="http://127.0.0.1:9000")
    name, options = dvc_remote.read_remote(root)
    assert name == "lab"
    assert options == {
        "url": "s3://bucket/cf",
        "endpointurl": "http://127.0.0.1:9000",
        "verify": "true",
        "connect_timeout": "5",
        "read_timeout": "60",
    }
    dvc_remote.add_remote(root, "lab", "s3://other/cf", local=True)
    assert dvc_remote.read_remote(root)[1]["url"] == "s3://other/cf"
    assert "s3://bucket/cf" in (root / ".dvc/config").read_text(), "what is said on one machine is not said for all"


def test_a_folder_is_a_remote_while_it_is_there(root: Path, tmp_path: Path) -> None:
    """DVC would make it, and fill the disk below the share that isn't mounted."""
    (tmp_path / "share").mkdir()
    dvc_remote.add_remote(root, "share", str(tmp_path / "share"))
    assert dvc_remote.check_remote(root).startswith("share (")
    (tmp_path / "share").rmdir()
    with pytest.raises(dvc_remote.RemoteAway, match="which is not there; mount its disk"):
        dvc_remote.push_outs(root, timeout=60)
    assert not (tmp_path / "share").exists()


def test_where_the_store_is_may_differ_from_machine_to_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compose.yaml states it in the environment of its workers."""
    port = closed_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    dvc_remote.add_remote(root, "lab", "s3://bucket/cf")
    with pytest.raises(dvc_remote.RemoteAway, match=f"doesn't answer at 127.0.0.1:{port}"):
        dvc_remote.check_remote(root)


@pytest.mark.parametrize(
    ("name", "url", "endpoint", "said"),
    [
        ("lab; rm", "s3://bucket", None, "can't be the name of a remote"),
        ("--force", "s3://bucket", None, "can't be the name of a remote"),
        ("lab", "s3://key:secret-word@bucket", None, "holds credentials"),
        ("lab", "s3://bucket", "http://key:secret-word@127.0.0.1:1", "holds credentials"),
        ("lab", "https://store/folder?signature=secret-word", None, "holds credentials"),
        ("lab", "--system", None, "neither a URL nor a folder"),
        ("lab", "s3://bucket\n[core]", None, "neither a URL nor a folder"),
        ("lab", "folder", "http://127.0.0.1:1", "--endpoint is for s3:// remotes"),
    ],
)
def test_what_can_not_be_a_remote(root: Path, name: str, url: str, endpoint: str | None, said: str) -> None:
    before = (root / ".dvc/config").read_text()
    with pytest.raises(dvc_remote.RemoteMisconfigured, match=said) as refused:
        dvc_remote.add_remote(root, name, url, endpoint=endpoint)
    assert "secret-word" not in str(refused.value)
    assert (root / ".dvc/config").read_text() == before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "has no DVC remote to hand over through; `cf remote add NAME URL` sets one up"),
        ("[core]\n    remote = lab\n", "core.remote names lab, which is not set up"),
        ("[core]\n    remote = lab\n['remote \"lab\"']\n    url = s3://bucket\n", "doesn't state verify = true"),
        (
            "[core]\n    remote = lab\n['remote \"lab\"']\n    url = s3://bucket\n    verify = true\n    secret_access_key = planted\n",
            "holds secret_access_key in .dvc/config, which is committed",
        ),
    ],
)
def test_what_a_person_must_change_first(root: Path, config: str, said: str) -> None:
    state(root, config)
    with pytest.raises(dvc_remote.RemoteMisconfigured, match=said) as refused:
        dvc_remote.push_outs(root, timeout=60)
    assert "planted" not in str(refused.value)


def test_the_command_says_one_sentence(root: Path) -> None:
    command = "import sys; from flows.project import dvc_remote; dvc_remote.main(['check'])"
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", command], cwd=root, env=path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"cf remote check: {root} has no DVC remote to hand over through; `cf remote add NAME URL` sets one up\n"


# ------------------------------------------------------------------------------------------------------------- the task


def outcome(root: Path) -> tuple[State[Any], State[Any]]:
    """A stage that has finished, and then the push, as a flow has them."""

    @task
    def stage() -> str:
        return "a week of training"

    @flow
    def night() -> tuple[State[Any], State[Any]]:
        return stage(return_state=True), dvc_remote.push_task.with_options(retry_delay_seconds=0)(root, return_state=True)

    return night()


def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []
    whole = dvc_remote.check_remote

    def check(root: Path) -> str:
        made.append(root)
        return whole(root)

    monkeypatch.setattr(dvc_remote, "check_remote", check)
    return made


def test_a_push_that_fails_is_tried_again_and_leaves_the_stage_finished(server: None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, tried = closed_port(), attempts(monkeypatch)
    dvc_remote.add_remote(root, "lab", "s3://bucket/cf", endpoint=f"http://127.0.0.1:{port}")
    stage, push = outcome(root)
    assert stage.is_completed() and push.is_failed()
    assert len(tried) == 4
    assert f"remote lab (s3://bucket/cf) doesn't answer at 127.0.0.1:{port}: Connection refused" in (push.message or "")


def test_what_a_person_must_change_is_not_tried_again(server: None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = attempts(monkeypatch)
    stage, push = outcome(root)
    assert stage.is_completed() and push.is_failed()
    assert len(tried) == 1
