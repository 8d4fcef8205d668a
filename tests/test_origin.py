"""Where a run comes from: DVC's md5s, the outs of other stages, the state of the tree, names that are nobody else's."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import offline
import pytest

from tasks.files.hashes import compute_dvc_md5
from tasks.params import yaml_file
from tasks.params.project import Project
from tasks.wandb_log import lineage, run
from tests.preloaded import python_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(offline.project(tmp_path))
    return tmp_path


def stated(tree: dict[str, Any]) -> Project:
    project = Project()
    project.tree, project.params = tree, cast(Any, SimpleNamespace(tracking=SimpleNamespace(project="toy")))
    return project


def test_digests_are_of_the_content_and_of_nothing_else(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another checkout with the same files has the same version; another byte is another one."""
    about = {"config": {"git": {"sha": "1", "dirty": False}}, "job_type": "clips", "group": "g"}
    one = run.build_artifact(Path("data/clips"), about)
    other = offline.project(tmp_path_factory.mktemp("other"))
    os.chdir(other)
    same = run.build_artifact(Path("data/clips"), about | {"job_type": "else"})
    assert one.digest == same.digest
    entry = one.manifest.entries["data/clips/a b/ä.mp4"]
    assert base64.b64decode(entry.digest).hex() == compute_dvc_md5(other / "data/clips/a b/ä.mp4")
    (other / "data/clips/a b/ä.mp4").write_bytes(b"clap")
    assert run.build_artifact(Path("data/clips"), about).digest != one.digest


def test_the_md5_that_dvc_writes(tmp_path: Path) -> None:
    """Against DVC itself: a folder with folders, and names that sort differently by part and by text."""
    for name in ("a/b.txt", "a.txt", "a-b/c", "ä", "z/b/c"):
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    python = python_folder() / "python"
    for words in (["git", "init", "-q"], [python, "-m", "dvc", "init", "-q"], [python, "-m", "dvc", "add", "-q", "folder"]):
        subprocess.run(words, cwd=tmp_path, check=True)
    (out,) = yaml_file.read_yaml(tmp_path / "folder.dvc")["outs"]
    assert compute_dvc_md5(tmp_path / "folder") == out["md5"]


def test_outs_of_other_stages_are_inputs_whole(here: Path) -> None:
    Path("models/teacher").mkdir(parents=True)
    Path("results").mkdir()
    assert [str(path) for path in lineage.list_inputs("report", stated({}))] == ["results", "models/teacher"]
    Path("dvc.yaml").write_text("stages: {filter: {deps: ['${clips.folder}'], outs: [kept]}}")
    Path("raw").mkdir()
    assert lineage.list_inputs("filter", stated({"clips": {"folder": "raw"}})) == []
    Path("raw.dvc").write_text("outs: []")
    assert lineage.list_inputs("filter", stated({"clips": {"folder": "raw"}})) == [Path("raw")]


def test_a_changed_tree_is_dirty_and_a_running_pipeline_is_not(here: Path) -> None:
    Path("metrics").mkdir()
    for name in ("metrics/clips.json", "dvc.lock", "params.yaml"):
        Path(name).write_text("1")
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "second"], check=True)
    Path("metrics/clips.json").write_text("2")
    Path("dvc.lock").write_text("2")
    assert lineage.describe_git()["dirty"] is False
    Path("params.yaml").write_text("2")
    assert lineage.describe_git()["dirty"] is True and lineage.describe_git()["changed"] == ["params.yaml"]


def test_one_name_for_all_stages_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CF_RUN", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getpgrp", os.getpid)  # a group whose first process lives
    first = lineage.name_pipeline_run(tmp_path)
    assert lineage.name_pipeline_run(tmp_path) == first
    monkeypatch.setattr(time, "strftime", lambda form: "20991231-0000")
    assert lineage.name_pipeline_run(tmp_path) == first, "it goes on after midnight"
    number, began, name = (tmp_path / "run").read_text().split()
    (tmp_path / "run").write_text(f"{number} {float(began) - 60} {name}")
    again = lineage.name_pipeline_run(tmp_path)
    assert again != first, "the number of a group that has ended, used again"
    monkeypatch.setattr(os, "getpgrp", lambda: 1)
    assert lineage.name_pipeline_run(tmp_path) != again
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(os, "getpgrp", lambda: gone.pid)
    assert lineage.name_pipeline_run(tmp_path) == lineage.name_pipeline_run(tmp_path), "its first process has ended, others go on"
    monkeypatch.setenv("CF_RUN", "nightly-7")
    assert lineage.name_pipeline_run(tmp_path) == "nightly-7"


def test_ids_are_fit_for_wandb_and_never_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_RUN", "a/b?c:%#" + "x" * 90)
    ids = [run.describe_run("causal_init", stated({}), here)["id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(len(one) <= 64 and not set(one) & set("/\\#?%:") for one in ids)
