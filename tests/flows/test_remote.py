"""Checkouts that share nothing but a DVC remote: a real S3 server on loopback, and clones with caches of their own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.project import dvc_remote
from tests.flows.s3 import BUCKET, CREDENTIALS, FEW, FILES, Machine, Store, commit, copy_lock, source, wait

OBJECTS = FILES + 5 + 1 + 3  # files of the three stages, and their lists


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, running: Store) -> tuple[Machine, Machine]:
    return make_machines(tmp_path_factory.mktemp("made"), running, FILES)


@pytest.fixture(scope="module")
def made_few(tmp_path_factory: pytest.TempPathFactory, running: Store) -> tuple[Machine, Machine]:
    return make_machines(tmp_path_factory.mktemp("few"), running, FEW)


def make_machines(folder: Path, running: Store, files: int) -> tuple[Machine, Machine]:
    """One that has made everything; one that has nothing."""
    origin = source(folder / "origin", files)
    dvc_remote.add_remote(origin, "lab", f"s3://{BUCKET}/cf", endpoint=running.url)
    commit(origin)
    one, two = (Machine(origin, folder / name) for name in ("one", "two"))
    one.dvc("repro", "--quiet")
    return one, two


@pytest.fixture
def store(running: Store) -> Store:
    running.empty()
    return running


@pytest.fixture
def machines(tmp_path: Path, made: tuple[Machine, Machine]) -> tuple[Machine, Machine]:
    """With so many files that a push or pull can be caught in the middle."""
    return made[0].moved(tmp_path), made[1].moved(tmp_path)


@pytest.fixture
def few_files(tmp_path: Path, made_few: tuple[Machine, Machine]) -> tuple[Machine, Machine]:
    return made_few[0].moved(tmp_path), made_few[1].moved(tmp_path)


# ----------------------------------------------------------------------------------------------------------- hand-over


def test_the_second_machine_takes_everything_from_the_first_and_gives_back(store: Store, few_files: tuple[Machine, Machine]) -> None:
    one, two = few_files
    dvc_remote.push_outs(one.root, timeout=120)
    assert "is cached - skipping run" in two.dvc("repro", "--pull", "clips")
    two.dvc("repro", "--pull")
    assert (one.ran(), two.ran()) == (["clips", "teacher", "report"], [])
    assert two.results() == one.results(), "with nothing committed and no dvc.lock to start from"

    for machine in (one, two):  # and the other way round: what was changed in both places is made in one
        text = (machine.root / "dvc.yaml").read_text()
        (machine.root / "dvc.yaml").write_text(text.replace("teacher 5", "teacher 6"))
    two.dvc("repro", "--quiet", "teacher")
    dvc_remote.push_outs(two.root, targets=["teacher"], timeout=120)
    one.dvc("repro", "--pull", "--quiet")
    assert (one.ran()[3:], two.ran()) == (["report"], ["teacher"])


def test_without_its_run_cache_a_machine_hands_over_nothing(store: Store, few_files: tuple[Machine, Machine]) -> None:
    """Why push says --run-cache."""
    one, two = few_files
    one.dvc("push", "--quiet")
    two.dvc("repro", "--pull", "--quiet")
    assert two.ran() == ["clips", "teacher", "report"]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def in_the_middle(store: Store, act: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        wait(lambda: store.requests("PUT") >= 20, 60, "the push to be on its way")
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_remote_that_stops_answering_in_the_middle_of_a_push(store: Store, machines: tuple[Machine, Machine]) -> None:
    one, two = machines
    freezing = in_the_middle(store, store.freeze)
    with pytest.raises(dvc_remote.RemoteAway, match="took more than 12 s for `dvc push`"):
        dvc_remote.push_outs(one.root, timeout=12)
    freezing.join()
    store.thaw()
    sent = len(store.objects())
    assert 0 < sent < OBJECTS, "it was to be frozen in the middle"
    store.forget_requests()
    dvc_remote.push_outs(one.root, timeout=120)
    assert store.requests("PUT") == OBJECTS - sent, "what had arrived was not sent again"
    two.dvc("repro", "--pull", "--quiet")
    assert two.ran() == [] and two.results() == one.results()


def test_a_remote_that_dies_in_the_middle_of_a_push(store: Store, machines: tuple[Machine, Machine]) -> None:
    one, two = machines
    killing = in_the_middle(store, store.kill)
    with pytest.raises(dvc_remote.RemoteAway, match=r"remote lab \(s3://clips/cf\)"):
        dvc_remote.push_outs(one.root, timeout=60)
    killing.join()
    with pytest.raises(dvc_remote.RemoteAway, match=r"doesn't answer at 127\.0\.0\.1:[0-9]+: Connection refused"):
        dvc_remote.push_outs(one.root, timeout=60)
    store.start()
    assert store.objects() == []
    dvc_remote.push_outs(one.root, timeout=120)
    two.dvc("repro", "--pull", "--quiet")
    assert two.ran() == [] and two.results() == one.results()


def test_a_damaged_object_is_seen_and_its_stage_runs_again(store: Store, few_files: tuple[Machine, Machine], tmp_path: Path) -> None:
    one, two = few_files
    dvc_remote.push_outs(one.root, timeout=120)
    whole = (one.root / "out/clips/007.txt").read_bytes()
    store.damage(whole)
    two.dvc("repro", "--pull", "--quiet")
    assert two.ran() == ["clips"]
    assert two.results() == one.results()
    assert dvc_remote.mend_remote(two.root) == [hashlib.md5(whole).hexdigest()], "and is sent again, so that a third machine need not"
    dvc_remote.push_outs(two.root, timeout=120)
    assert dvc_remote.mend_remote(two.root) == []
    three = Machine(two.root, tmp_path / "three")
    three.dvc("repro", "--pull", "--quiet")
    assert three.ran() == [] and three.results() == one.results()


def test_a_killed_pull_goes_on_where_it_was(store: Store, machines: tuple[Machine, Machine]) -> None:
    one, two = machines
    dvc_remote.push_outs(one.root, timeout=120)
    copy_lock(one, two)
    store.forget_requests()
    command = [sys.executable, "-m", "dvc", "pull", "--run-cache"]
    with subprocess.Popen(command, cwd=two.root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as pull:
        wait(lambda: store.requests("GET") >= 40, 60, "the pull to be on its way")
        os.killpg(pull.pid, signal.SIGKILL)
    had = two.cached()
    assert 0 < had < OBJECTS, "it was to be killed in the middle"
    assert not (two.root / "out").exists()
    store.forget_requests()
    dvc_remote.pull_outs(two.root, timeout=120)
    # the log may still have got some of the killed one's
    assert store.requests("GET") <= OBJECTS - had // 2, "what had arrived was taken again"
    assert two.results() == one.results()
    two.dvc("repro", "--quiet")
    assert two.ran() == []
