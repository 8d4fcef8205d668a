"""`cf gc` removes what nothing names, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.project import gc, run_lock, worktree
from tests.flows import project

RATE = "rate: 2.0e-6"


def made(root: Path, rate: str) -> None:
    """`slow` with another rate, whose weights are others by that; dvc.lock and metrics are not committed."""
    params = root / "params.yaml"
    params.write_text(params.read_text().replace(RATE, f"rate: {rate}"))
    project.dvc(root, "repro", "-q", "slow")


def committed(root: Path, rate: str) -> str:
    project.git(root, "switch", "-q", "--detach", "main")
    made(root, rate)
    project.git(root, "commit", "-qam", rate)
    return project.git(root, "rev-parse", "HEAD").strip()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = project.make(tmp_path_factory.mktemp("gc") / "project", seconds=0.1)
    work = root / "work.py"
    work.write_text(
        work.read_text().replace('"w" * 100', 'str(params["slow"]["rate"])').replace('"loss": 0.5', '"loss": params["slow"]["rate"]')
    )
    project.dvc(root, "repro", "-q")
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "made")
    return root


def weights(root: Path) -> str:
    return (root / "models/slow/weights").read_text()


def test_what_a_branch_a_tag_an_experiment_or_a_worktree_names_stays(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo)
    project.git(repo, "tag", "-a", "-m", "{}", "student@v0.0.1", committed(repo, "3"))
    project.git(repo, "update-ref", "refs/exps/ab/cd/another", committed(repo, "4"))
    committed(repo, "5")  # on no branch afterwards
    project.git(repo, "switch", "-q", "main")
    project.dvc(repo, "checkout", "-q")
    live = worktree.make_worktree(repo, "live", profile=None, overrides={})
    made(live, "6")
    capsys.readouterr()
    gc.main([])
    said = capsys.readouterr().out
    assert said.startswith("3 objects of the cache") and "`cf gc --delete` removes" in said, "weights, their folder's list, and metrics"
    gc.main(["--delete"])
    gc.main([])
    assert capsys.readouterr().out.splitlines()[1].startswith("0 objects of the cache")
    for root, value in ((repo, "2e-06"), (live, "6")):
        shutil.rmtree(root / "models")
        (root / "metrics/slow.json").unlink()
        assert "Stage 'slow' is cached - skipping run" in project.dvc(root, "repro", "slow"), "metrics are needed for that too"
        assert weights(root) == value
    assert "Stage 'slow' didn't change, skipping" in project.dvc(repo, "repro", "slow"), "a second time there is nothing to do"
    for name, value in (("student@v0.0.1", "3"), ("refs/exps/ab/cd/another", "4")):
        project.dvc(repo, "get", "--rev", name, "--out", f"got-{value}", ".", "models/slow")
        assert (repo / f"got-{value}/weights").read_text() == value


def test_nothing_is_removed_while_something_is_at_work(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    folder = worktree.make_worktree(repo, "busy", profile=None, overrides={})
    with run_lock.hold_checkout(folder), pytest.raises(SystemExit, match="busy is in use by another run"):
        gc.main(["--delete"])
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "dvc"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE) as dvc, pytest.raises(SystemExit, match=f"process {dvc.pid}"):
        assert dvc.stdout and dvc.stdout.readline()
        try:
            gc.main(["--delete"])
        finally:
            dvc.kill()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="is no checkout of its own"):
        gc.main([])
    monkeypatch.chdir(repo)
    project.dvc(repo, "cache", "dir", "--local", str(tmp_path))
    with pytest.raises(SystemExit, match="which other checkouts may use"):
        gc.main([])


def test_a_run_is_opened_elsewhere_with_its_results(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while its own folder lives, on whose branch git has no second folder."""
    monkeypatch.chdir(repo)
    (repo / ".dvc/config.local").unlink(missing_ok=True)
    run = worktree.make_worktree(repo, "opened", profile=None, overrides={"slow.rate": 7})
    project.dvc(run, "repro", "-q")
    project.git(run, "commit", "-qam", "results")
    worktree.main(["open", "opened", str(tmp_path / "again")])
    assert "again is opened at " in capsys.readouterr().out
    assert weights(tmp_path / "again") == "7.0"
    assert "Running stage" not in project.dvc(tmp_path / "again", "repro")
    shutil.rmtree(repo / ".dvc/cache/files")
    worktree.main(["open", "run/opened", str(tmp_path / "empty")])
    said = capsys.readouterr().out
    assert "not with all that its stages made: " in said and "Checkout failed for following targets: " in said and "models/slow" in said
    for name, place, sentence in (
        ("nobody", "none", "nobody is neither a run nor a branch"),
        ("--force", "none", "open: error"),
        ("opened", "empty", "is there already"),
        ("opened", "empty/work.py/none", "cf: `git worktree add --quiet` failed in"),
    ):
        with pytest.raises(SystemExit) as refused:
            worktree.main(["open", name, str(tmp_path / place)])
        assert sentence in f"{refused.value} {capsys.readouterr().err}"
