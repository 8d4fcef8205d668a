"""What a night leaves behind: a promotion or none, branches and tags that go to origin, and params.yaml with one line changed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import pytest

from flows import nightly
from flows.night import handover, records, state, steps
from flows.night import judge as judged
from flows.night.gate import Measured, Rule, decide_promotion
from flows.project import overrides, registry
from tests.flows.test_nightly import file, record
from tests.week import project

ROOT = project.ROOT
LOCK = "stages: {{stage2: {{outs: [{{path: models/stage2, md5: {}.dir}}]}}}}\n"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return project.make(tmp_path / "project")


def at_work(repo: Path, lines: list[str], **changed: Any) -> state.NightState:
    stated = overrides.parse_params((repo / "params.yaml").read_text())
    base = project.git(repo, "rev-parse", "main").strip()
    root = repo / ".runs/night"
    project.git(repo, "worktree", "add", "-q", "--detach", str(root))
    given = {"past": [], "promoted": registry.find_promoted(repo), "date": "2026-01-07", "clips_folder": None, "full": False} | changed
    settings = state.NightSettings.model_validate(stated["nightly"])
    return state.NightState(
        state.NightPlan(repo=repo, root=root, run="r", base=base, settings=settings, from_folder=True, log=lines.append, **given)
    )


def promoting(night: state.NightState, md5: str) -> state.NightEnd:
    (night.plan.root / "dvc.lock").write_text(LOCK.format(md5))
    rules = [Rule(metric="a", better="higher", margin=0.0, bound=None)]
    night.candidate = md5
    night.verdict = decide_promotion(Measured(md5=md5, numbers={"a": 1.0}, videos=[("p", 0)]), None, rules)
    return steps.close_night(night, "promoted", "better")


def test_a_night_promotes_and_waits_to_be_handed_over(repo: Path) -> None:
    one = at_work(repo, [])
    assert promoting(one, "aa") == state.NightEnd("promoted", "better", "2026-01-07", "v0.0.1")
    now = registry.find_promoted(repo)
    assert now and now.name == "v0.0.1" and handover.waiting_branches(repo) == ["nightly/2026-01-07"]


def test_whoever_rolled_back_meanwhile_has_decided(repo: Path) -> None:
    for md5 in ("aa", "bb"):
        registry.assign_version(repo, registry.register_version(repo, file(repo, "main", "dvc.lock", LOCK.format(md5)), {}), {})
    one = at_work(repo, [])
    registry.roll_back(repo, None, "it flickers")
    end = promoting(one, "cc")
    assert (end.outcome, end.version) == ("refused", None) and "v0.0.2 was promoted when this night began, and v0.0.1 is now" in end.why
    now = registry.find_promoted(repo)
    assert now and now.name == "v0.0.1"
    assert '"promote": false' in project.git(repo, "show", "nightly/2026-01-07:nightly/gate.json")
    assert [one.outcome for one in records.read_nights(repo)] == ["refused"]


def test_a_night_that_was_not_judged_has_no_numbers_of_another(repo: Path) -> None:
    file(repo, "main", records.GATE, "{}")
    steps.close_night(at_work(repo, []), "no good clips", "none")
    assert records.GATE not in project.git(repo, "ls-tree", "-r", "--name-only", "nightly/2026-01-07")


def test_the_prompts_of_a_folder_are_those_of_the_first_night_that_judged(repo: Path) -> None:
    file(repo, "nightly/2026-01-05", records.RECORD, record("2026-01-05", outcome="refused").to_json())
    file(repo, "nightly/2026-01-05", records.PROMPTS, "a car\na tree\n")
    file(repo, "nightly/2026-01-06", records.RECORD, record("2026-01-06", outcome="no good clips").to_json())
    one = at_work(repo, [], past=records.read_nights(repo))
    kept = steps.choose_prompts(one)
    assert kept and kept.is_absolute() and kept.read_text() == "a car\na tree\n"
    stated = overrides.parse_params((repo / "params.yaml").read_text())
    assert judged.nightly_parameters(stated, kept)["generate"]["prompts_file"] == str(kept)
    one.plan.settings.prompts = 5
    assert steps.choose_prompts(one) is None and not kept.exists(), "others are asked for"
    one.plan.settings.prompts_file = Path("mine.txt")
    assert steps.choose_prompts(one) == one.plan.root / "mine.txt"


# ------------------------------------------------------------------------------------------------------------ origin


@pytest.fixture
def two(repo: Path, tmp_path: Path) -> Path:
    """Another machine's checkout."""
    project.git(tmp_path, "init", "-q", "--bare", "-b", "main", "origin.git")
    project.git(repo, "remote", "add", "origin", str(tmp_path / "origin.git"))
    project.git(repo, "push", "-q", "origin", "main")
    project.git(tmp_path, "clone", "-q", str(tmp_path / "origin.git"), "two")
    return tmp_path / "two"


def test_a_name_that_is_taken_at_origin_is_told_and_keeps_no_other_night_back(repo: Path, two: Path) -> None:
    for one in (repo, two):
        file(one, "nightly/2026-01-05", "x", one.name)
        project.git(one, "tag", "-a", "-m", one.name, "student@v0.0.1")
        handover.add_waiting(one, "nightly/2026-01-05")
    assert handover.send_waiting(repo, timeout=60, pauses=[], log=print) is None
    with pytest.raises(RuntimeError, match=r"origin has another student@v0\.0\.1; keep one: `git push origin :student@v0\.0\.1`"):
        handover.fetch_origin(two)
    assert records.free_date(two, "2026-01-05") == "2026-01-05-2"
    project.git(two, "branch", "nightly/2026-01-06", "main")
    handover.add_waiting(two, "nightly/2026-01-06")
    late = handover.send_waiting(two, timeout=60, pauses=[], log=print)
    assert late and "origin has another nightly/2026-01-05" in late and "student@v0.0.1" in late
    assert "refs/heads/nightly/2026-01-06" in project.git(two, "ls-remote", "origin")


def test_what_origin_took_meanwhile_is_known_at_the_end(repo: Path, two: Path) -> None:
    one = at_work(two, [])
    file(repo, "nightly/2026-01-07", records.RECORD, record("2026-01-07").to_json())
    project.git(repo, "push", "-q", "origin", "nightly/2026-01-07")
    end = promoting(one, "aa")
    assert (end.date, handover.waiting_branches(two)) == ("2026-01-07-2", ["nightly/2026-01-07-2"])
    assert handover.send_waiting(two, timeout=60, pauses=[], log=print) is None


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("profile", ["tiny", "smoke", "small", "wan-1.3b"])
def test_one_value_is_one_line_of_params_yaml(profile: str, tmp_path: Path) -> None:
    place, before = tmp_path / "params.yaml", (ROOT / f"profiles/{profile}.yaml").read_text()
    place.write_text(before)
    overrides.apply_overrides(place, {"start.stage2": "models/stage1", "generate.prompts_file": None})
    assert place.read_text() == before, "it says so already"
    overrides.apply_overrides(place, {"start.stage2": "promoted/student"})
    changed = [line for line in difflib.ndiff(before.splitlines(), place.read_text().splitlines()) if line[0] in "+-"]
    assert [line.split("#")[0].strip() for line in changed] == ["-   stage2: models/stage1", "+   stage2: promoted/student"]


@pytest.mark.parametrize(("named", "folder"), [("raw", "raw"), ("raw/", "raw"), ("./raw", "raw"), ("/data/raw", None)])
def test_the_folder_by_its_plain_name(named: str, folder: str | None) -> None:
    assert state.tracked_clips_folder({"clips": {"source": "folder", "folder": named}}) == folder


def test_what_a_night_refuses_before_it_trains(repo: Path) -> None:
    with pytest.raises(ValueError, match=r"clips\.folder is a/b; a night needs one right below"):
        state.tracked_clips_folder({"clips": {"source": "folder", "folder": "a/b"}})
    stated = overrides.parse_params((repo / "params.yaml").read_text())
    state.check_settings(stated)
    stated["nightly"]["rules"][0]["metric"] = "prompts.student.sprite_recall"
    with pytest.raises(ValueError, match=r"nightly\.rules asks for prompts\.student\.sprite_recall"):
        state.check_settings(stated)
    with pytest.raises(ValueError, match="2026-02-30 is no day of the calendar"):
        nightly.check_date("2026-02-30")


@pytest.mark.parametrize(
    ("date", "last", "full"),
    [("2026-01-11", None, True), ("2026-01-12", "2026-01-04", True), ("2026-01-12", "2026-01-05", False), ("2026-01-12", None, False)],
)
def test_a_full_night_that_failed_does_not_wait_a_week(date: str, last: str | None, full: bool) -> None:
    past = [record(last, kind="full"), record("2026-01-10")] if last else []
    assert (nightly.reason_for_full(date, "sunday", past) is not None) == full


def test_of_nights_that_failed_one_folder_stays(repo: Path) -> None:
    for number in range(4):
        name = f"nightly-2026-01-0{number}" if number < 3 else "another-run"
        folder = repo / ".runs" / name
        project.git(repo, "worktree", "add", "-q", "--detach", str(folder))
        (folder / "params.yaml").write_text("changed")
        os.utime(folder, (0, 1000 + number))
    moved = repo / ".runs/nightly-2026-01-09"  # whose checkout is elsewhere now
    moved.mkdir()
    (moved / ".git").write_text("gitdir: /nowhere")
    os.utime(moved, (0, 2000))
    nightly.remove_failed_worktrees(repo, lambda _: None)
    assert sorted(folder.name for folder in (repo / ".runs").iterdir()) == ["another-run", "nightly-2026-01-02", "nightly-2026-01-09"]
