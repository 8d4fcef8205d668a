"""Nights, on tests/week's project of seconds: what they decide, and four of them in a row. `make test-week` has all that goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from flows import nightly
from flows.night import clips, handover, judge, records, steps, warm_start
from flows.night.state import NightState
from flows.project import dvc_graph, overrides
from flows.project.registry import Version
from tests.preloaded import python_folder
from tests.week import project

ROOT = project.ROOT


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return project.make(tmp_path / "project")


def file(repo: Path, branch: str, name: str, text: str, base: str | None = None) -> str:
    """A commit on a branch with one more file."""
    known = project.git(repo, "branch", "--list", branch).strip()
    project.git(repo, "checkout", "-q", *([branch] if known else ["-b", branch, *([base] if base else [])]))
    (repo / name).parent.mkdir(exist_ok=True)
    (repo / name).write_text(text)
    project.git(repo, "add", "-A")
    project.git(repo, "commit", "-qm", f"{name} on {branch}")
    commit = project.git(repo, "rev-parse", "HEAD").strip()
    project.git(repo, "checkout", "-q", "main")
    return commit


def record(date: str, **changed: Any) -> records.NightRecord:
    stated: dict[str, Any] = {
        "date": date, "kind": "warm", "base": "b", "clips": "c", "data": {}, "arrived": [], "turned_away": {}, "rejected": {},
        "outcome": "promoted", "why": "because", "candidate": "m", "before": None, "run": "r",
    }  # fmt: skip
    return records.NightRecord(**stated | changed)


# ------------------------------------------------------------------------------------------------------ what was before


def test_a_night_is_a_branch_with_a_record_of_its_own_date(repo: Path) -> None:
    file(repo, "nightly/2026-01-05", records.RECORD, record("2026-01-05").to_json())
    file(repo, "nightly/2026-01-06", records.RECORD, record("2026-01-05").to_json())  # began at the one before, and never ended
    file(repo, "nightly/2026-01-07", records.RECORD, "{")
    file(repo, "nightly/rubbish", records.RECORD, record("rubbish").to_json())
    file(repo, "nightly/2026-01-05-2", records.RECORD, record("2026-01-05-2").to_json())
    assert [one.date for one in records.read_nights(repo)] == ["2026-01-05", "2026-01-05-2"]
    free = [records.free_date(repo, date) for date in ("2026-01-05", "2026-01-06")]
    assert free == ["2026-01-05-3", "2026-01-06-2"], "whatever is in the branch"


def test_nights_of_another_machine_count(repo: Path, tmp_path: Path) -> None:
    file(repo, "nightly/2026-01-05", records.RECORD, record("2026-01-05").to_json())
    project.git(tmp_path, "clone", "-q", str(repo), "clone")
    assert [one.date for one in records.read_nights(tmp_path / "clone")] == ["2026-01-05"]


@pytest.mark.parametrize(
    ("mine", "theirs", "taken"),
    [
        ("old", None, ["main"]),
        (None, "new", ["nightly"]),
        ("old", "new", ["nightly"]),  # only the night has more than there was
        ("more", "old", ["main"]),
        ("more", "new", ["main", "nightly"]),
        ("more", "more", ["main"]),
    ],
)
def test_whose_clips_go_in(repo: Path, mine: str | None, theirs: str | None, taken: list[str]) -> None:
    if mine is not None:
        file(repo, "main", "raw.dvc", "old")
    last = None
    if theirs is not None:
        if theirs != "old":
            file(repo, "nightly/2026-01-05", "raw.dvc", theirs)
        file(repo, "nightly/2026-01-05", records.RECORD, record("2026-01-05").to_json())
        last = records.read_nights(repo)
    if mine == "more":
        file(repo, "main", "raw.dvc", "more")
    plan: Any = SimpleNamespace(repo=repo, base="main", past=last or [])
    assert [ref.removeprefix("refs/heads/").partition("/")[0] for ref in clips.commits_with_clips(plan, "raw.dvc")] == taken


@pytest.mark.parametrize(
    ("full", "clips", "base", "past", "new"),
    [
        (False, "c", "b", [], True),
        (False, "c", "b", [record("2026-01-05")], False),
        (False, "d", "b", [record("2026-01-05")], True),
        (False, "c", "other", [record("2026-01-05")], False),  # new code alone waits for the full night
        (True, "c", "other", [record("2026-01-05", kind="full")], True),
        (True, "c", "b", [record("2026-01-05", kind="full")], False),
        (True, "c", "b", [record("2026-01-05")], True),  # there was no full one yet
        (True, "d", "b", [record("2026-01-05", kind="full"), record("2026-01-06", clips="d")], True),
        (True, None, "b", [], False),
    ],
)
def test_what_is_news(full: bool, clips: str | None, base: str, past: list[records.NightRecord], new: bool) -> None:
    plan: Any = SimpleNamespace(full=full, clips_folder="raw", base=base, past=past)
    assert steps.has_news(NightState(plan, clips=clips)) == new


def test_the_tracked_branch_is_the_one_that_is_ahead(repo: Path, tmp_path: Path) -> None:
    project.git(tmp_path, "clone", "-q", str(repo), "clone")
    clone = tmp_path / "clone"
    newer = file(repo, "main", "a", "a")
    assert nightly.tracked_commit(clone, "main") != newer
    project.git(repo, "tag", "-a", "-m", "{}", "student@v0.0.1")
    handover.fetch_origin(clone, 60)
    assert project.git(clone, "tag").split() == ["student@v0.0.1"]
    assert nightly.tracked_commit(clone, "main") == newer, "origin's, after the fetch"
    ours = file(clone, "main", "b", "b")
    assert nightly.tracked_commit(clone, "main") == ours, "parted: the one here"
    project.git(clone, "remote", "set-url", "origin", str(tmp_path / "gone"))
    with pytest.raises(RuntimeError, match="`git fetch` with origin failed"):
        handover.fetch_origin(clone, 60)
    with pytest.raises(ValueError, match=r"nightly\.branch is absent, which is neither here nor at origin"):
        nightly.tracked_commit(clone, "absent")


def test_one_night_at_a_time(repo: Path) -> None:
    first = nightly.lock_night(repo)
    assert first and nightly.lock_night(repo) is None
    with first:
        pass
    assert nightly.lock_night(repo)


# -------------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize("profile", ["tiny", "smoke", "small", "wan-1.3b"])
def test_both_are_judged_by_the_pipelines_own_commands(profile: str, tmp_path: Path) -> None:
    """Of the real dvc.yaml: every option that the stages have, with absolute paths, and only the given ones changed."""
    stated = overrides.parse_params((ROOT / f"profiles/{profile}.yaml").read_text())
    stage = next(stage for stage in dvc_graph.read_graph(ROOT) if stage.name == "generate")
    words = judge.stage_command(ROOT, stage, {"stage2": tmp_path / "s", "codec": tmp_path / "c", "out": tmp_path / "o"})
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[1:4] == ["-m", "tasks", "generate"] and options["--stage2"] == str(tmp_path / "s")
    assert options["--teacher"] == str(ROOT / "models/teacher") and options["--out"] == str(tmp_path / "o")
    changed = judge.nightly_parameters(stated, None)
    ours = changed["generate"]
    assert ours["systems"] == {"student": stated["generate"]["systems"]["stage2"]} and ours["continuations"] == {}
    assert (ours["seeds"], ours["prompts"]) == (stated["nightly"]["seeds"], stated["nightly"]["prompts"])
    judge.write_yaml(tmp_path / "params.yaml", changed)
    assert overrides.parse_params((tmp_path / "params.yaml").read_text()) == changed
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    if (prompts := tmp_path / stated["start"]["prompts"]).suffix == ".txt":
        prompts.write_text("a prompt\n")
    validated = [python_folder() / "python", "-m", "tasks", "validate", "--params", "params.yaml", "--out", "out.json"]
    done = subprocess.run(validated, cwd=tmp_path, env=project.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ begin and end


def test_a_stage_that_is_new_makes_the_night_a_full_one(repo: Path) -> None:
    file(repo, "main", "dvc.lock", "stages: {codec: {outs: []}}")
    version = Version("v0.0.1", project.git(repo, "rev-parse", "main").strip(), 0, {})
    assert warm_start.reason_against_warm(repo, repo, version, ["codec"]) is None
    assert warm_start.reason_against_warm(repo, repo, version, ["codec", "stage1"]) == "stage1 was not there when v0.0.1 was made"


def test_what_waits_is_known_after_a_crash_and_gone_when_it_is_sent(repo: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert handover.send_waiting(repo, timeout=60, pauses=[], log=said.append) is None
    project.git(repo, "branch", "nightly/2026-01-05")
    project.git(repo, "branch", "nightly/2026-01-06")
    for day in (5, 6, 5, 4):  # the 4th died before it had a branch
        handover.add_waiting(repo, f"nightly/2026-01-0{day}")
    project.git(repo, "remote", "add", "origin", str(tmp_path / "absent.git"))
    late = handover.send_waiting(repo, timeout=60, pauses=[], log=said.append)
    assert late and "`git push` with origin failed" in late
    assert late.startswith("nightly/2026-01-05, nightly/2026-01-06 could not be handed over")
    project.git(tmp_path, "init", "-q", "--bare", "absent.git")
    project.git(repo, "tag", "-a", "-m", "{}", "student@v0.0.1")
    assert handover.send_waiting(repo, timeout=60, pauses=[], log=said.append) is None and handover.waiting_branches(repo) == []
    there = project.git(repo, "ls-remote", "origin")
    assert "refs/heads/nightly/2026-01-06" in there and "refs/tags/student@v0.0.1" in there


NIGHTS = """
import sys
from pathlib import Path
from flows.nightly import nightly
from flows.project import dvc_command
from tests.preloaded import PreloadedPython
from tests.week import project
dvc_command.sys = PreloadedPython()
root = Path.cwd()
def run(date, **more):
    state = nightly(date=date, return_state=True, **more)
    print("NIGHT", date, state.name, state.message, flush=True)
project.clips(root, "a", "b", "c")
run("2026-01-05")
run("2026-01-06")
project.clips(root, "bad1")
run("2026-01-06")
project.clips(root, "d")
run("2026-01-07")
print("ENDED", (root / ".runs/nightly.json").read_text())
project.git(root, "merge", "-q", "nightly/2026-01-07")
project.clips(root, "e")
project.git(root, "remote", "add", "origin", str(root / "gone"))
run("2026-01-11")
project.git(root, "init", "-q", "--bare", "gone")
run("2026-01-12")
"""


def test_nights_in_a_row(server: None, repo: Path, tmp_path: Path) -> None:
    """From nothing; nothing new; one that is no video; one good clip, from the promoted student; and, after that night's branch was
    merged, a Sunday without its origin, which the next night finds again."""
    environment = project.environment(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_API_URL=str(PREFECT_API_URL.value()))
    done = subprocess.run([sys.executable, "-c", NIGHTS], cwd=repo, env=environment, capture_output=True, text=True, timeout=1500)
    told = [line.split(maxsplit=3)[1:] for line in done.stdout.splitlines() if line.startswith("NIGHT")]
    states = ["Promoted", "NoNewData", "NoGoodClips", "Promoted", "NotPushed", "NoNewData"]
    assert [words[1] for words in told] == states, done.stdout + done.stderr[-3000:]
    assert "1 unreadable" in told[2][2]
    last = json.loads(project.git(repo, "show", "nightly/2026-01-07:nightly/record.json"))
    assert (last["kind"], last["before"], last["arrived"]) == ("warm", "v0.0.1", ["d.mp4"])
    lock = yaml.safe_load(project.git(repo, "show", "nightly/2026-01-07:dvc.lock"))["stages"]
    first = yaml.safe_load(project.git(repo, "show", "nightly/2026-01-05:dvc.lock"))["stages"]
    (start,) = [dep["md5"] for dep in lock["stage2"]["deps"] if dep["path"] == "promoted/student"]
    (weights,) = [out["md5"] for out in first["stage2"]["outs"] if out["path"] == "models/stage2"]
    assert start == weights, "it began as the promoted student, by its dvc.lock"
    assert lock["stage1"] == first["stage1"], "and what leads to it was left as it was"
    assert project.git(repo, "status", "--porcelain", "--untracked-files=no").strip() == "", "nobody's checkout is touched"
    assert len(list((repo / "work/kept/filter").iterdir())) == 6
    ended = json.loads(done.stdout.partition("ENDED ")[2].splitlines()[0])
    assert ended["outcome"] == "Promoted" and ended["good"] == ended["ended"]
    assert "nightly/2026-01-11 could not be handed over" in " ".join(told[4])
    assert handover.waiting_branches(repo) == [] and "nightly/2026-01-11" in project.git(repo, "ls-remote", "origin")
    sunday = records.read_nights(repo)[-1]
    frozen = "frozen: true" in project.git(repo, "show", f"{sunday.ref}:dvc.yaml")
    assert (sunday.kind, frozen) == ("full", False), "and it took the freezing back"
    prompts = [project.git(repo, "show", f"nightly/2026-01-{day}:{records.PROMPTS}") for day in ("05", "07", "11")]
    assert len(set(prompts)) == 1 and prompts[0].count("prompt ") == 4
    assert "promoted" in json.loads(project.git(repo, "show", f"{sunday.ref}:{records.GATE}"))["numbers"], "both were judged"
