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


def place(made: Path, root: Path, checkpoint: str) -> None:
    """In the place of slow's model, for last to be measured with it."""
    commit = evaluate.fetch_checkpoint(made, root, checkpoint, "slow", ["last"])
    evaluate.record_checkpoint.fn(made, root, checkpoint, "slow", commit)


def test_a_folder_and_the_commit_that_then_holds_it(made: Path, root: Path) -> None:
    given = made / "elsewhere"
    given.mkdir()
    (given / "weights").write_text("another student")
    place(made, root, "elsewhere")
    said = project.dvc(root, "repro")
    assert "Running stage 'last'" in said and "Running stage 'slow'" not in said
    assert (root / "models/slow/weights").read_text() == "another student"
    assert (root / "metrics/slow.json").read_text() == "{}\n", "the numbers of another training are gone"
    project.git(root, "add", "-A")
    project.git(root, "commit", "-qm", "measured")

    again = fresh(made, "by-its-commit")
    place(made, again, f"run/{root.name}")
    assert (again / "models/slow/weights").read_text() == "another student"
    assert "Running stage" not in project.dvc(again, "repro"), "it is the same: all of it comes from the cache"


def test_the_numbers_of_a_commit_come_with_its_model(made: Path, root: Path) -> None:
    place(made, root, "main")
    assert (root / "metrics/slow.json").read_text() == (made / "metrics/slow.json").read_text()


def test_what_is_refused(made: Path, root: Path) -> None:
    empty, link = made / "empty", made / "link"
    empty.mkdir()
    link.mkdir()
    (link / "weights").symlink_to("/etc/hostname")
    for checkpoint, stage, sentence in (
        ("empty", "slow", "is empty"),
        ("link", "slow", "is a link or no plain file"),
        ("raw.txt", "slow", "is neither a folder in"),
        ("student@v9.9.9", "slow", "is neither a folder in"),
        ("--help", "slow", "is neither a folder in"),
        ("empty", "last", "no single folder in models/"),
        ("empty", "nothing", "nothing is no stage; known are prepare"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate.fetch_checkpoint(made, root, checkpoint, stage, ["last"])
    assert (root / "dvc.yaml").read_text() == (made / "dvc.yaml").read_text()


def test_a_checkpoint_is_judged_before_anything_runs(server: None, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt folder would cost the whole training before it, and one of the operating system would be copied into the cache."""
    monkeypatch.chdir(made)
    (made / "tasks/commands").mkdir()
    (made / "tasks/commands/check_model.py").write_text("")
    main = made / "tasks/__main__.py"
    check = 'elif words[:1] == ["check-model"]:\n    sys.exit(f"cf check-model: {words[1]} is no model of {words[3]}")\n'
    main.write_text(main.read_text() + check)
    project.git(made, "add", "-A")
    project.git(made, "commit", "-qm", "a check")
    for checkpoint, sentence in (("misspelt", "misspelt is neither a folder in"), ("/etc", "/etc is no model of slow")):
        asked = Checkpoint(checkpoint=checkpoint, stage="slow", measured=["last"], overrides=["seed=7"])
        state = evaluate.evaluate(asked, return_state=True)
        assert state.is_failed() and state.message.startswith(sentence), state.message
    for folder in worktree.list_worktrees(made)[:2]:
        assert not (folder / "trace").exists() and not (folder / "models").exists()


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
