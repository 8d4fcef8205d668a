"""The cache and the remotes of a worktree are its checkout's, wherever that is and however its remotes are stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.project import dvc_config, worktree
from tasks.files.dvc_config import read_public_config
from tests.flows import project

LOCAL = """[core]
    remote = lab
['remote "lab"']
    url = ssh://me@host/data
    keyfile = /home/me/.ssh/id
    password = planted
    ask_password = true
['remote "web"']
    url = https://me:planted@host/data
    token = planted
['remote "amazon"']
    url = s3://bucket/folder
    secret_access_key = planted
    access_key_id = planted
    sse_kms_key_id = a-name
    credentialpath = /home/me/.aws
"""


def stated(folder: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in project.dvc(folder, "config", "--list").splitlines() if "=" in line)


def test_remotes_come_without_their_secrets_and_work(tmp_path: Path) -> None:
    repo = project.make(tmp_path / "project")
    (repo / ".dvc/config.local").write_text(LOCAL)
    folder = worktree.make_worktree(repo, "a-run", profile=None, overrides={})
    assert "planted" not in (folder / ".dvc/config.local").read_text()
    found = stated(folder)
    assert found["core.remote"] == "lab" and found["remote.lab.url"] == "ssh://me@host/data"
    assert found["remote.lab.keyfile"] == "/home/me/.ssh/id" and found["remote.lab.ask_password"] == "true"
    assert found["remote.web.url"] == "https://host/data"
    assert found["remote.amazon.sse_kms_key_id"] == "a-name" and found["remote.amazon.credentialpath"] == "/home/me/.aws"


@pytest.mark.parametrize("level", ["--local", "--project"])
def test_a_folder_is_where_it_is_for_the_checkout(level: str, tmp_path: Path) -> None:
    repo = project.make(tmp_path / "project")
    (tmp_path / "share").mkdir()
    project.dvc(repo, "remote", "add", level, "-d", "lab", "../share")
    project.git(repo, "commit", "-qam", "a remote", "--allow-empty")
    folder = worktree.make_worktree(repo, "a-run", profile=None, overrides={})
    assert stated(folder)["remote.lab.url"] == str(tmp_path / "share")


@pytest.mark.parametrize("name", ["a,b", "a#b", "a b", "a'b", "a%b"])
def test_folders_have_odd_names(name: str, tmp_path: Path) -> None:
    repo = project.make(tmp_path / name / "project")
    folder = worktree.make_worktree(repo, "a-run", profile=None, overrides={})
    assert project.dvc(folder, "cache", "dir").strip() == str(repo / ".dvc/cache")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("ssh://me:p@ss@host:22/x", "ssh://me@host:22/x"),
        ('"ssh://me@host/x"', '"ssh://me@host/x"'),
        ("https://token@host/x?signature=1", "https://host/x"),
        ("s3://user:word@bucket/a@b", "s3://bucket/a@b"),
        ("../a:b@c", "../a:b@c"),
    ],
)
def test_addresses_without_credentials(address: str, public: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f"[a]\nurl = {address}\nnew_option = planted\n")
    config = read_public_config(tmp_path / "config")
    assert dict(config["a"]) == {"url": public}


def test_what_is_a_secret() -> None:
    known = "password access_key_id secret_access_key session_token sas_token account_key connection_string client_secret oss_key_secret"
    assert all(dvc_config.is_secret(key) for key in known.split())
    others = "url keyfile verify profile configpath gdrive_service_account_json_file_path"
    assert not any(dvc_config.is_secret(key) for key in others.split())
