"""Secrets stand in the environment of a run, and nowhere else afterwards. The search itself is tried on places where one was put."""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.s3 import BUCKET, Store
from tests.preloaded import FLOW
from tests.security.places import found

ROOT = Path(__file__).parents[2]
PLANTED = {
    name: secrets.token_hex(20)
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "WANDB_API_KEY",
        "CF_ALERT_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "HF_TOKEN",
        "SOMETHING_PASSWORD",
    )
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store")) as store:
        yield store


def environment(home: Path) -> dict[str, str]:
    given = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "WANDB_", "AWS_", "CF_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", os.defpath)])
    password = f"cf:{PLANTED['PREFECT_SERVER_API_AUTH_STRING']}"  # of the server that the flow starts for itself, too
    known = {"PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_API_AUTH_STRING": password}
    stated = known | {"CF_ALERT_URL": f"http://127.0.0.1:9/hook/{PLANTED['CF_ALERT_URL']}", "PREFECT_HOME": str(home / "prefect")}
    who = {f"GIT_{role}_{what}": "tests@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    quiet = {"DVC_NO_ANALYTICS": "true", "AWS_EC2_METADATA_DISABLED": "true", "AWS_ACCESS_KEY_ID": "AKIAFORTESTSONLY"}
    return given | who | quiet | PLANTED | stated | {"HOME": str(home), "PATH": path, "WANDB_MODE": "offline"}


@pytest.mark.slow
def test_a_run_leaves_no_secret_anywhere(tmp_path: Path, store: Store) -> None:
    """The real project, of which the first stages run in a worktree of their own, under Prefect, with W&B offline, and are pushed."""
    home, project = tmp_path / "home", tmp_path / "home/project"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(project)], check=True)
    env = environment(home)
    add = [sys.executable, "-m", "tasks", "remote", "add", "lab", f"s3://{BUCKET}/cf", "--endpoint", store.url, "--local"]
    subprocess.run(add, cwd=project, env=env, check=True)
    run = [sys.executable, "-c", FLOW, "--profile", "smoke", "--set", "seed=7", "--to", "clips", "--push"]
    done = subprocess.run(run, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    (home / "said.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    for each in store.objects():
        (home / each.replace("/", "-")).write_bytes(store.client().get_object(Bucket=BUCKET, Key=each)["Body"].read())
    there = {path.name for path in home.rglob("*")}
    wandb = any(name.endswith(".wandb") for name in there)
    assert {"prefect.db", "dvc.lock", "params.yaml", "said.txt"} <= there and wandb, "all that is to be searched"
    assert list(project.glob(".runs/*/dvc.lock")) and list(home.glob("cf-files-*"))
    assert found(home, PLANTED) == []


def test_a_run_that_fails_says_no_secret(tmp_path: Path) -> None:
    """Nothing listens there, and the sentence names the address."""
    home, project = tmp_path / "home", tmp_path / "home/project"
    project.mkdir(parents=True)
    env = environment(home)
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=project, env=env, check=True)
    script = (
        "from pathlib import Path; from flows.project import dvc_remote as remote; here = Path.cwd()\n"
        "remote.add_remote(here, 'lab', 's3://bucket/cf', endpoint='http://127.0.0.1:9')\n"
        "remote.CONNECT = 1\n"
        "remote.push_outs(here)\n"
    )
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", script], cwd=project, env=env, capture_output=True, text=True, timeout=120)
    assert "doesn't answer at 127.0.0.1:9" in done.stderr
    (home / "said.txt").write_text(done.stdout + done.stderr)
    assert found(home, PLANTED) == []


# ------------------------------------------------------------------------------------------------- the search finds


def in_a_file(folder: Path, secret: str) -> None:
    (folder / "runtime").mkdir()
    (folder / "runtime/clips.json").write_text(f'{{"env": "{secret}"}}')


def in_base64(folder: Path, secret: str) -> None:
    from base64 import b64encode

    (folder / "header").write_bytes(b"Basic " + b64encode(b"cf:" + secret.encode()))


def cut_in_two(folder: Path, secret: str) -> None:
    (folder / "run.wandb").write_bytes(b"\0" * 100 + secret[:25].encode() + b"\x7f\0\1header" + secret[25:].encode())


def in_a_database(folder: Path, secret: str) -> None:
    with sqlite3.connect(folder / "prefect.db") as database:
        database.execute("create table log (said text)")
        database.execute("insert into log values (?)", ("x" * 5000 + secret + "y" * 5000,))


def in_a_commit(folder: Path, secret: str) -> None:
    git(folder, "init", "--quiet")
    (folder / "params.yaml").write_text(secret)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "planted")
    (folder / "params.yaml").unlink()
    git(folder, "commit", "--quiet", "--all", "--message", "gone again")


def in_a_message(folder: Path, secret: str) -> None:
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", f"run with {secret}")


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words], cwd=folder, check=True)


@pytest.mark.parametrize("put", [in_a_file, in_base64, cut_in_two, in_a_database, in_a_commit, in_a_message])
def test_the_search_finds_a_secret(tmp_path: Path, put: Callable[[Path, str], None]) -> None:
    assert found(tmp_path, PLANTED) == []
    put(tmp_path, PLANTED["HF_TOKEN"])
    places = found(tmp_path, PLANTED)
    assert places and all(place.startswith("HF_TOKEN in ") for place in places)
