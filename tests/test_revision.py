"""Runs by name: a folder, a Git revision, an experiment of DVC; what of them comes out of Git, DVC's cache and its remote."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_compare import PARAMS, edit_cells, text, write

from tasks.commands import compare as page
from tasks.params.yaml_file import Refused
from tests.preloaded import python_folder


def command(root: Path, *words: str) -> None:
    subprocess.run(words, cwd=root, check=True, capture_output=True)


def commit(root: Path, message: str) -> None:
    command(root, "git", "add", "-A")
    command(root, "git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", message)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits whose outs DVC holds, and an experiment on the second; of the first the workspace has nothing left."""
    root = tmp_path_factory.mktemp("repository")
    command(root, "git", "init", "-q")
    dvc = (str(python_folder() / "python"), "-m", "dvc")
    command(root, *dvc, "init", "-q")
    write(root, note="first")
    stages = {"base": "models/base", "generate": "samples", "evaluate": "results"}
    (root / "dvc.yaml").write_text("stages:\n" + "".join(f'  {name}: {{cmd: "true", outs: [{out}]}}\n' for name, out in stages.items()))
    (root / ".gitignore").write_text("/models\n/samples\n/results\n/data\n/reports\n")
    command(root, *dvc, "commit", "-q", "-f")
    commit(root, "the first")
    edit_cells(root, lambda row: row.update(value=float(row["value"]) + 1))  # type: ignore[arg-type]
    (root / "params.yaml").write_text(PARAMS.replace("NOTE", "second"))
    command(root, *dvc, "commit", "-q", "-f")
    commit(root, "the second")
    sha = subprocess.run(["git", "rev-parse", "HEAD~1"], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
    command(root, "git", "update-ref", f"refs/exps/{sha[:2]}/{sha[2:]}/rusty-lamb", sha)
    return root


def test_revisions_and_experiments(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(repository)
    before = subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    for name in ("HEAD~1", "rusty-lamb"):
        page.main([name, ".", "--out", str(tmp_path / "page.html")])
        said = text((tmp_path / "page.html").read_text())
        assert f"{name} beside" in said and "the first" in said and '"first" "second"' in said
        assert "sharpness ≈" in said and "+1.00" in said
        # four prompts' videos of four systems and what is real, two continuations' of five systems
        assert (tmp_path / "page.html").read_text().count("data:video/mp4") == 4 * (4 * 2 + 1) + 2 * 5 * 2
    after = subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    worktrees = subprocess.run(["git", "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert before == after and len(worktrees.splitlines()) == 1


def test_what_a_revision_brings(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outs by DVC's cache, of models the curve alone, metrics by Git."""
    monkeypatch.chdir(repository)
    root = page.find_folder("HEAD~1", tmp_path / "A")
    assert (root / "results/cells.jsonl").exists() and (root / "metrics/evaluate.json").exists()
    assert len(list(root.glob("samples/**/*.mp4"))) == len(list(repository.glob("samples/**/*.mp4")))
    assert (root / "models/base/metrics.jsonl").read_bytes() == (repository / "models/base/metrics.jsonl").read_bytes()
    assert not list(root.glob("models/base/*.safetensors"))


def test_outs_that_only_the_remote_has(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And of one that nobody has any more, the rest is shown."""
    root = tmp_path / "clone"
    shutil.copytree(repository, root, symlinks=True)
    dvc = (str(python_folder() / "python"), "-m", "dvc")
    command(root, *dvc, "remote", "add", "-q", "--local", "-d", "store", str(tmp_path / "store"))
    command(root, *dvc, "remote", "add", "-q", "--local", "lab", "s3://user:hunter2@bucket/x")
    command(root, *dvc, "remote", "modify", "-q", "--local", "lab", "secret_access_key", "hunter2")
    command(root, *dvc, "push", "-q", "results", "samples", "-r", "store")
    shutil.rmtree(root / ".dvc/cache")
    monkeypatch.chdir(root)
    found = page.find_folder("HEAD", tmp_path / "A")
    assert (found / "results/cells.jsonl").read_bytes() == (repository / "results/cells.jsonl").read_bytes()
    assert not (found / "models/base").exists(), "never pushed"
    told = (found / ".dvc/config.local").read_text()
    assert "url = s3://bucket/x" in told and "hunter2" not in told, "a comparison that is killed leaves its folder"


@pytest.mark.parametrize("name", ["no-such-thing", "--upload-pack=touch x", "-h", "exp", "HEAD^{tree}"])
def test_a_name_that_is_no_run(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(Refused, match="neither a folder, nor a revision"):
        page.find_folder(name, tmp_path / "A")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"is a folder without params\.yaml"):
        page.find_folder(str(tmp_path), tmp_path / "A")
