"""A Dask cluster of two workers in place of this machine's processes: the same results, also when a worker dies in the middle."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cf_model.data import clip_encoder
from cf_model.data.cluster import run_on_cluster
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tests.test_kept import FACTS, codec, night, source  # noqa: F401  fixtures

PATHS = [Path(f"{number:02d}") for number in range(12)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made:
        yield made


def work_or_kill_the_worker(path: Path) -> str:
    """Write down that the path was worked on; file 05 kills the worker that it is on, the first time."""
    marks = path.parent
    first = not (marks / f"{path.name}.begun").exists()
    (marks / f"{path.name}.begun").touch()
    if path.name == "05" and first:
        os.kill(os.getppid(), signal.SIGKILL)  # this is the worker's child
    if path.name == "07":
        raise ValueError("07 is bad; replace it")
    if path.name == "08":
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_worker_killed_in_the_middle_loses_nothing_and_repeats_nothing(cluster: Any, tmp_path: Path) -> None:
    paths = [tmp_path / path for path in PATHS]
    answers = list(run_on_cluster(work_or_kill_the_worker, deque(enumerate(paths)), address=cluster.scheduler_address, timeout=60.0))
    assert [index for index, _ in answers] == list(range(12))
    found = dict(answers)
    bad, crashed = found.pop(7), found.pop(8)
    assert found == {index: f"{index:02d}" for index in found}
    assert bad == Unreadable("07 is bad; replace it") and isinstance(crashed, Unreadable) and "08 crashed its reader" in crashed.sentence
    assert {path.stem for path in tmp_path.iterdir()} == {path.name for path in PATHS}


def test_filter_and_encode_write_the_same_bytes_on_a_cluster(
    source: Path,  # noqa: F811
    codec: Path,  # noqa: F811
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CF_KEPT", "off")
    here, _ = night(source, codec, tmp_path / "here")
    monkeypatch.setenv("CF_DASK", cluster.scheduler_address)
    there, worked = night(source, codec, tmp_path / "there")
    assert there == here and worked[FACTS[0]] == 3


def test_two_encoders_of_two_gpus_write_the_bytes_of_one(
    source: Path,  # noqa: F811
    codec: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CF_KEPT", "off")
    one, _ = night(source, codec, tmp_path / "one")
    monkeypatch.setattr(clip_encoder, "list_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(clip_encoder, "open_encoder", None)  # no clip is encoded in this process
    monkeypatch.setattr(clip_encoder.ClipEncoder, "close", lambda self: None)
    assert night(source, codec, tmp_path / "two")[0] == one


def read_gpu(path: Path) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_child_has_a_gpu_of_its_own_and_the_parents_environment_stays() -> None:
    before = dict(os.environ)
    gpus = [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in (3, 5)]
    answers = dict(read_in_subprocess(read_gpu, PATHS[:2], workers=2, timeout=60.0, environments=gpus))  # a file for each child
    assert answers == {0: "3", 1: "5"}
    assert dict(os.environ) == before


def test_no_scheduler_is_a_sentence() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match=r"CF_DASK is nowhere://x, where no Dask scheduler answers .*; start one, or unset it$"):
        next(run_on_cluster(str, deque([(0, 1)]), address="nowhere://x", timeout=1.0))
