"""The project itself, profile smoke, through a deployment: every stage in a worktree, once for real and once out of the cache."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows import project
from tests.system.driver import Machine
from tests.test_pipeline import STAGES, lay_out


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = lay_out(tmp_path_factory.mktemp("smoke") / "project")
    project.git(root, "checkout", "-q", "--", "params.yaml")
    machine = Machine(root, CF_GPUS="0")
    try:
        machine.up()
        machine.command("flows.machine.deploy")
        yield machine
    finally:
        machine.down()
        machine.told.stop()


def test_a_smoke_run_and_the_same_again(ours: Machine) -> None:
    run = ours.start(profile="smoke")
    assert ours.finish(run, 1000) == "Completed", ours.run(run)["state"]["message"]
    states = ours.tasks(run)
    assert {stage: states[stage] for stage in STAGES} == dict.fromkeys(STAGES, "Completed")
    root = ours.worktree(run)
    assert (root / "reports/report.html").stat().st_size > 10_000
    assert project.git(root, "status", "--porcelain", "--untracked-files=no") == ""
    lock = project.git(ours.root, "show", f"run/{root.name}:dvc.lock")
    assert lock == (root / "dvc.lock").read_text()
    assert "Running stage" not in project.dvc(root, "repro"), "the branch repeats it"

    shown = ours.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    (metrics,) = [one["data"] for one in shown if one["key"] == "metrics"]
    first, folded = metrics.split("<details>")
    assert "stage1, sprite recall" in first and "<td>evaluate</td>" in folded and "<td>stage2</td>" in folded
    assert {f"progress-{stage}" for stage in ("teacher", "stage2", "generate")} <= {one["key"].replace("_", "-") for one in shown}

    (link,) = [one["data"] for one in shown if one["key"] == "report"]
    address = re.search(r"\((http://127[^)]+)\)", link)
    assert address and urllib.request.urlopen(address[1], timeout=30).read() == (root / "reports/report.html").read_bytes()

    again = ours.start(profile="smoke")
    assert ours.finish(again, 1000) == "Completed", ours.run(again)["state"]["message"]
    states = ours.tasks(again)
    assert {states[stage] for stage in STAGES if stage != "validate"} == {"Restored"}  # validate has nothing that is cached
    assert (ours.worktree(again) / "dvc.lock").read_text() == lock


def test_its_student_measured_by_its_commit(ours: Machine) -> None:
    """The same bytes in the place of stage2: nothing has to be made again, and stage2 itself doesn't run."""
    first = min((ours.root / ".runs").glob("*-????????/"), key=lambda folder: folder.stat().st_ctime)
    given = ours.start("evaluate", checkpoint=f"run/{first.name}", profile="smoke")
    assert ours.finish(given, 1000) == "Completed", ours.run(given)["state"]["message"]
    states = ours.tasks(given)
    assert {states[stage] for stage in ("generate", "evaluate", "report")} == {"Restored"} and "stage2" not in states
    place: Path = ours.worktree(given)
    assert (place / "models/stage2").is_dir()
    # which the flow asked for in its own way, and nothing measured needs
    assert set(re.findall("Running stage '(.*)'", project.dvc(place, "repro"))) <= {"validate"}


def test_two_nights_of_the_real_stages(ours: Machine) -> None:
    """All but the judging comes out of the cache. The first night has nothing to be better than; the second makes the same again."""
    project.git(ours.root, "checkout", "-qB", "main")
    ours.command("tasks", "profile", "use", "smoke")
    project.git(ours.root, "commit", "-qam", "nights of smoke")
    first = ours.start_night(date="2026-01-05")
    assert ours.finish(first, 1000) == "Promoted", ours.run(first)["state"]["message"]
    gate = json.loads(project.git(ours.root, "show", "nightly/2026-01-05:nightly/gate.json"))
    assert gate["promote"] and {"real", "student"} == set(gate["numbers"]["candidate"]["prompts"])
    assert all(finding["candidate"] is not None for finding in gate["findings"])
    assert [one["event"] for one in ours.told.heard] == ["promoted"]
    assert "student@v0.0.1" in project.git(ours.root, "tag", "--list")

    second = ours.start_night(date="2026-01-06")
    assert ours.finish(second, 1000) == "NoNewData"
    third = ours.start_night(date="2026-01-06", full=True)
    assert ours.finish(third, 1000) == "TheSameAgain", ours.run(third)["state"]["message"]
    night = json.loads(project.git(ours.root, "show", "nightly/2026-01-06:nightly/record.json"))
    assert night["kind"] == "full" and night["candidate"] == gate["candidate"] and night["before"] == "v0.0.1"
