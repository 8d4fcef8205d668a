"""A given checkpoint in the place of a stage's model, without a server; the whole flow is in tests/system."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows import evaluate
from flows.evaluate import Checkpoint
from flows.project import dvc_graph, worktree
from tests.flows import project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of four stages, run once and committed."""
    root = project.make(tmp_path_factory.mktemp("evaluate") / "project", seconds=0.1)
    project.dvc(root, "repro", "-q")
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "a run")
    return root


@pytest.fixture
def root(made: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate, "get_run_logger", lambda: logging.getLogger("test"))
    return fresh(made, request.node.name.replace("_", "-"))


def fresh(made: Path, name: str) -> Path:
    """As the flow has it when the checkpoint comes: what stands before is restored."""
    root = worktree.make_worktree(made, name, profile=None, overrides={})
    project.dvc(root, "repro", "-q", "prepare", "stubborn")
    return root


def test_a_folder_and_the_commit_that_then_holds_it(made: Path, root: Path) -> None:
    given = made / "elsewhere"
    given.mkdir()
    (given / "weights").write_text("another student")
    evaluate.place_checkpoint.fn(made, root, "elsewhere", "slow", ["last"])
    said = project.dvc(root, "repro")
    assert "Running stage 'last'" in said and "Running stage 'slow'" not in said
    assert (root / "models/slow/weights").read_text() == "another student"
    assert (root / "metrics/slow.json").read_text() == "{}\n", "the numbers of another training are gone"
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "measured")

    again = fresh(made, "by-its-commit")
    evaluate.place_checkpoint.fn(made, again, f"run/{root.name}", "slow", ["last"])
    assert (again / "models/slow/weights").read_text() == "another student"
    assert "Running stage" not in project.dvc(again, "repro"), "it is the same: all of it comes from the cache"


def test_the_numbers_of_a_commit_come_with_its_model(made: Path, root: Path) -> None:
    evaluate.place_checkpoint.fn(made, root, "main", "slow", ["last"])
    assert (root / "metrics/slow.json").read_text() == (made / "metrics/slow.json").read_text()


def test_what_is_refused(made: Path, root: Path) -> None:
    empty, link = made / "empty", made / "link"
    empty.mkdir()
    link.mkdir()
    (link / "weights").symlink_to("/etc/hostname")
    for checkpoint, stage, sentence in (
        ("empty", "slow", "is empty"),
        ("link", "slow", "is a link or no plain file"),
        ("student@v9.9.9", "slow", "is neither a folder in"),
        ("--help", "slow", "is neither a folder in"),
        ("empty", "last", "no single folder in models/"),
        ("empty", "nothing", "nothing is no stage; known are prepare"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate.place_checkpoint.fn(made, root, checkpoint, stage, ["last"])
    assert (root / "dvc.yaml").read_text() == (made / "dvc.yaml").read_text()


def test_nothing_is_measured_that_comes_from_another_model(made: Path) -> None:
    graph = dvc_graph.read_graph(made)

    def before(measured: list[str], replaced: str) -> list[str]:
        return [stage.name for stage in evaluate.stages_before(graph, dvc_graph.select_stages(graph, measured), replaced)]

    assert before(["last"], "slow") == ["prepare", "stubborn"]
    with pytest.raises(ValueError, match=r"slow is made from prepare; add slow, stubborn to what is measured, or name stubborn as"):
        before(["last"], "prepare")
    assert before(["slow", "stubborn", "last"], "prepare") == []


@pytest.mark.parametrize("checkpoint", ["--upload-pack=x", "a b", "$(touch x)", "x;y", "", "a\nb", "`x`"])
def test_no_word_of_the_form_is_an_option_or_a_command(checkpoint: str) -> None:
    with pytest.raises(ValidationError):
        Checkpoint(checkpoint=checkpoint)
