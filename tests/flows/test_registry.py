"""The registry is git's tags: ours to write, and `gto`'s to read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.night import promotion
from flows.project import dvc_lock, registry
from tests.preloaded import python_folder

SCRIPT = """import pathlib
folder = pathlib.Path("models/stage2/deep/er")
folder.mkdir(parents=True)
(folder / "é").write_text("x")
(folder.parent / "b").write_text("y")
"""
GTO = Path(sys.executable).with_name("gto")


def git(repo: Path, *words: str) -> str:
    done = subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    return tmp_path


def trained(repo: Path, md5: str) -> str:
    """A commit whose dvc.lock has a student."""
    entry = f"    outs:\n    - path: models/stage2\n      hash: md5\n      md5: {md5}.dir\n      size: 3\n      nfiles: 1\n"
    (repo / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  stage2:\n    cmd: x\n{entry}")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", md5)
    return git(repo, "rev-parse", "HEAD")


def gto(repo: Path, *words: str) -> str:
    done = subprocess.run([str(GTO), *words], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_versions_and_promotions_and_the_way_back_as_gto_reads_them(repo: Path) -> None:
    for md5 in ("aa", "bb", "cc"):
        version = registry.register_version(repo, trained(repo, md5), {"metrics": {"recall": 0.5}, "why": f"because {md5}"})
        registry.assign_version(repo, version, {"why": md5})
    assert [one.name for one in registry.list_versions(repo)] == ["v0.0.1", "v0.0.2", "v0.0.3"]
    assert registry.find_promoted(repo) == registry.list_versions(repo)[2]
    first = registry.list_versions(repo)[0]
    assert first.about == {"path": "models/stage2", "md5": "aa.dir", "metrics": {"recall": 0.5}, "why": "because aa"}
    made = registry.roll_back(repo, None, "it flickers")
    assert (made.number, made.version.name, made.about["from"]) == (4, "v0.0.2", "v0.0.3")
    registry.roll_back(repo, None, "that one too")
    assert registry.find_promoted(repo) == registry.list_versions(repo)[0]
    last = next(line for line in gto(repo, "show").splitlines() if "student" in line)
    assert last.split("│")[2:4] == [" v0.0.3   ", " v0.0.1      "], last
    said = gto(repo, "history", "student")
    assert said.count("assignment") == 5 and said.count("registration") == 3
    told = promotion.history_lines(repo)
    assert [line.split()[2] for line in told] == ["version", "promoted"] * 3 + ["rollback"] * 2 and "it flickers" in told[6]


def test_a_commit_is_one_version_and_a_taken_number_is_left_out(repo: Path) -> None:
    commit = trained(repo, "aa")
    assert registry.register_version(repo, commit, {}) == registry.register_version(repo, commit, {"other": 1})
    git(repo, "tag", "student@v0.0.9")  # lightweight: no version, and in the way
    assert registry.register_version(repo, trained(repo, "bb"), {}).name == "v0.0.10"
    assert registry.register_version(repo, trained(repo, "cc"), {}).name == "v0.0.11", "v0.0.10 is younger than v0.0.9"
    with pytest.raises(RuntimeError, match=r"student@v0\.0\.9 could not be made"):
        registry._create_tag(repo, "student@v0.0.9", "HEAD", {})
    git(repo, "tag", "-a", "-m", "{}", "student#promoted#4", git(repo, "commit-tree", "-m", "no version", "HEAD^{tree}"))
    assert registry.assign_version(repo, registry.find_version(repo, "v0.0.10"), {}).number == 5


def test_what_others_tagged_is_read_or_left(repo: Path) -> None:
    commit = trained(repo, "aa")
    git(repo, "tag", "-a", "-m", "by hand", "student@v1.2.3", commit)
    git(repo, "tag", "-a", "-m", "x", "student@v1.x", commit)
    git(repo, "tag", "-a", "-m", "x", "other@v9.0.0", commit)
    git(repo, "tag", "-a", "-m", "[1]", "student#promoted#1", commit)
    git(repo, "tag", "-a", "-m", "{}", "student#promoted#2", git(repo, "commit-tree", "-m", "no version", "HEAD^{tree}"))
    assert [(one.name, one.about) for one in registry.list_versions(repo)] == [("v1.2.3", {"said": "by hand"})]
    assert [one.number for one in registry.list_assignments(repo)] == [1]
    assert registry.register_version(repo, trained(repo, "bb"), {}).name == "v1.2.4"


@pytest.mark.parametrize("name", ["v1", "1.0.0", "v0.0.1; rm -rf /", "--force", "v0.0.1\n", "HEAD", "../v0.0.1"])
def test_names_are_checked_before_git_sees_them(repo: Path, name: str) -> None:
    registry.assign_version(repo, registry.register_version(repo, trained(repo, "aa"), {}), {})
    with pytest.raises(ValueError, match="is no version"):
        registry.roll_back(repo, name, "")


def test_what_can_not_be_rolled_back(repo: Path) -> None:
    with pytest.raises(ValueError, match="no student was ever promoted"):
        registry.roll_back(repo, None, "")
    one = registry.register_version(repo, trained(repo, "aa"), {})
    two = registry.register_version(repo, trained(repo, "bb"), {})
    registry.assign_version(repo, one, {})
    with pytest.raises(ValueError, match="only student that was ever promoted"):
        registry.roll_back(repo, None, "")
    with pytest.raises(ValueError, match=r"v0\.0\.2 was never promoted"):
        registry.roll_back(repo, "v0.0.2", "")
    with pytest.raises(ValueError, match=r"no student@v0\.0\.9; known are v0\.0\.1, v0\.0\.2"):
        registry.roll_back(repo, "v0.0.9", "")
    registry.assign_version(repo, two, {})
    with pytest.raises(ValueError, match=r"v0\.0\.2 is the promoted one already"):
        registry.roll_back(repo, "v0.0.2", "")
    registry.roll_back(repo, None, "")
    with pytest.raises(ValueError, match=r"v0\.0\.1 was the first to be promoted; name the version to go to: v0\.0\.2"):
        registry.roll_back(repo, None, "")


def test_what_is_promoted_already_gets_no_second_tag(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(repo, "aa")
    monkeypatch.chdir(repo)
    for _ in range(2):
        promotion.promote_student(["HEAD"])
    promotion.promote_student(["v0.0.1"])
    assert [one.number for one in registry.list_assignments(repo)] == [1]


@pytest.mark.parametrize("command", [lambda: promotion.promote_student(["HEAD"]), lambda: promotion.roll_back_student([])])
def test_promoting_waits_for_whoever_is_at_it(repo: Path, command: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for md5 in ("aa", "bb"):
        registry.assign_version(repo, registry.register_version(repo, trained(repo, md5), {}), {})
    trained(repo, "cc")
    monkeypatch.chdir(repo)
    waiting = threading.Thread(target=command, daemon=True)
    with registry.lock_registry(repo):
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and len(registry.list_assignments(repo)) == 2
    waiting.join(60)
    assert len(registry.list_assignments(repo)) == 3


def test_a_commit_without_a_student_can_not_be_promoted(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo / "a").write_text("a")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "a")
    monkeypatch.chdir(repo)
    for words, said in ((["HEAD"], "has no dvc.lock"), (["--", "--upload-pack=x"], "is no commit"), (["v0.0.1"], "known are none yet")):
        with pytest.raises(SystemExit, match=said):
            promotion.promote_student(words)


def dvc(folder: Path, *words: str) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([python_folder() / "python", "-m", "dvc", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def made(repo: Path) -> Path:
    """A project of one stage that has run."""
    dvc(repo, "init", "-q")
    (repo / "make.py").write_text(SCRIPT)
    stage = f"    cmd: {sys.executable} make.py\n    deps: [make.py]\n    outs: [models/stage2]\n"
    (repo / "dvc.yaml").write_text(f"stages:\n  stage2:\n{stage}")
    dvc(repo, "repro", "-q")
    (repo / "raw").mkdir()
    (repo / "raw/clip").write_text("clip")
    dvc(repo, "add", "-q", "raw")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "made")
    return repo


def test_verify_sees_what_dvc_status_does_not(made: Path) -> None:
    assert dvc_lock.find_damage(made) == []
    file = made / "models/stage2/deep/b"
    before = file.stat()
    file.write_text("z")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    (said,) = dvc_lock.find_damage(made)
    assert said.startswith("stage2: stage2 has the md5 ") and dvc_lock.find_damage(made, ["raw.dvc"]) == []
    (made / "raw/clip").unlink()
    assert "raw.dvc: raw has the md5" in dvc_lock.find_damage(made)[1]
    with pytest.raises(ValueError, match=r"dvc\.lock has no stage stage3"):
        dvc_lock.find_damage(made, ["stage3"])


def test_weights_come_by_their_tag_from_the_cache_and_from_the_remote(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    version = registry.register_version(made, "HEAD", {})
    got = tmp_path_factory.mktemp("got")
    registry.fetch_weights(made, version, got / "a")
    assert (got / "a/deep/er/é").read_text() == "x"
    dvc(made, "remote", "add", "-d", "store", str(got / "store"))
    dvc(made, "push", "-q")
    git(made, "add", "-A")
    git(made, "commit", "-qm", "remote")
    version = registry.register_version(made, "HEAD", {})
    git(got, "clone", "-q", str(made), "clone")
    registry.fetch_weights(got / "clone", registry.find_version(got / "clone", version.name), got / "b")
    assert (got / "b/deep/er/é").read_text() == "x"


def test_weights_take_the_place_of_yesterdays_and_of_nothing_else(
    made: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daily job says `cf promoted --out weights` again and again."""
    monkeypatch.chdir(made)
    out = tmp_path_factory.mktemp("got") / "weights"
    for text in ("x", "x", "another"):
        (made / "make.py").write_text(SCRIPT.replace('"x"', repr(text)))
        dvc(made, "repro", "-q")
        git(made, "add", "-A")
        git(made, "commit", "-q", "--allow-empty", "-m", text)
        registry.assign_version(made, version := registry.register_version(made, "HEAD", {}), {})
        promotion.show_promoted(["--out", str(out)])
        assert capsys.readouterr().out.startswith(version.name)
        assert {file.name: file.read_text() for file in out.rglob("*") if file.is_file()} == {"é": text, "b": "y"}
    (out / "mine").write_text("notes")
    with pytest.raises(SystemExit, match="holds something else than a version's weights; delete it, or name another folder"):
        promotion.show_promoted(["--out", str(out)])
    assert (out / "mine").exists() and [path.name for path in out.parent.iterdir()] == ["weights"]


def test_damaged_weights_are_not_handed_out(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """DVC trusts its cache."""
    version = registry.register_version(made, "HEAD", {})
    (listed,) = [file for file in (made / ".dvc/cache").rglob("*") if file.is_file() and file.read_bytes() == b"y"]
    listed.chmod(0o644)
    listed.write_text("z")
    got = tmp_path_factory.mktemp("got")
    with pytest.raises(RuntimeError, match=r"the weights of student@v0\.0\.1 could not be had: .*(not what its dvc\.lock says|md5)"):
        registry.fetch_weights(made, version, got / "a")
    assert list(got.iterdir()) == []
