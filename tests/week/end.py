"""What the week must have left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import yaml

from tests.week import project

if TYPE_CHECKING:
    from tests.week.week import Week


def promoted(week: Week) -> str:
    return week.machine.command("flows.night.promotion", "promoted").split()[0]


def lock(week: Week, ref: str) -> Any:
    return yaml.safe_load(week.git("show", f"{ref}:dvc.lock"))["stages"]


def kept(week: Week, stage: str) -> set[str]:
    return {file.name for file in (week.root / "work/kept" / stage).glob("*")}


def at_origin(week: Week, version: str) -> bool:
    return f"refs/tags/student@{version}" in week.git("ls-remote", "--tags", "origin")


def at_the_end(week: Week) -> None:
    week.say("--- at the end")
    history = week.machine.command("flows.night.promotion", "history")
    for line in history.splitlines():
        week.say(f"    {line}")
    nights = week.git("for-each-ref", "--format=%(refname:short)", "refs/heads/nightly").splitlines()
    told = all(night.partition("/")[2] in history for night in nights)
    week.holds("each of the seven nights has its branch, and history tells of it", len(nights) == 7 and told)
    tried = {night: quality(week, night) for night in nights}
    now = week.git("rev-list", "-1", f"student@{promoted(week)}")
    best = max(tried, key=lambda night: tried[night])
    week.say(f"    candidates: {', '.join(f'{day(night)} {value:.4f}' for night, value in tried.items())}")
    week.holds(f"the promoted student is the best one, {day(best)}'s", week.git("rev-parse", best) == now)
    shown = project.ran(week.root, "gto", "show")
    week.holds("`gto show` says the same", f" {promoted(week)} " in shown.splitlines()[3])
    elsewhere(week, nights, best)
    back_and_forth(week)
    week.machine.down()
    said = week.machine.command("flows.machine.alerts", "--hours", "0.0001", code=1)
    week.holds("with everything stopped, `cf nightly-check` still tells of the absence", bool(week.told("absent")) and "no nightly" in said)
    secret = week.alerts.url.rpartition("/")[2]
    files = [file for name in (".machine", ".runs", ".git") for file in (week.root / name).rglob("*") if file.is_file()]
    week.holds("the webhook's URL is in no file of the machine", not any(secret.encode() in file.read_bytes() for file in files))


def day(night: str) -> str:
    return night.removeprefix("nightly/")


def quality(week: Week, night: str) -> float:
    gate = json.loads(week.git("show", f"{night}:nightly/gate.json"))
    return float(next(one["candidate"] for one in gate["findings"] if one["metric"] == "prompts.student.quality"))


def elsewhere(week: Week, nights: list[str], best: str) -> None:
    """A clone with nothing in its cache finds all of it at origin and the remote."""
    clone = week.folder / "clone"
    project.git(week.folder, "clone", "-q", str(week.folder / "origin.git"), str(clone))
    for night in nights:
        project.git(clone, "branch", "-q", "--track", night, f"origin/{night}")
    project.dvc(clone, "fetch", "--all-branches", "--all-tags")
    week.holds("a fresh clone gets the data of all nights from the remote: nothing is lost", True)
    shutil.rmtree(clone / ".dvc/cache")
    command = [sys.executable, "-m", "flows.night.promotion", "promoted", "--out", "got"]
    done = subprocess.run(command, cwd=clone, env=project.environment(), capture_output=True, text=True)
    weights = (clone / "got/weights.json").read_text() if done.returncode == 0 else done.stderr
    week.holds(f"and the promoted weights by their tag: {weights.strip()}", weights == project_weights(week, best))
    project.git(clone, "checkout", "-q", best)
    project.dvc(clone, "pull", "-q")
    names = {file.stem for file in (clone / "raw").glob("*.mp4")}
    arrived = {file.stem for file in (week.root / "inbox").glob("*.mp4")}
    week.holds(f"all {len(arrived)} clips that ever arrived are in its folder", names == arrived)
    again = project.dvc(clone, "repro", "--dry", "stage2")
    week.holds("at the best night's commit `dvc repro` has nothing to do", "Running stage" not in again)
    said = project.ran(clone, sys.executable, "-m", "flows.project.dvc_lock", "stage2", "promoted.dvc", "raw.dvc")
    week.holds(f"`cf verify`: {said.strip()}", "are what dvc.lock says" in said)


def project_weights(week: Week, night: str) -> str:
    folder = next(path for path in (week.root / ".runs").glob(f"nightly-{day(night)}-*") if (path / "nightly/record.json").exists())
    return (folder / "models/stage2/weights.json").read_text()


def back_and_forth(week: Week) -> None:
    now, past = promoted(week), "v0.0.2"
    week.machine.command("flows.night.promotion", "rollback", past, "--why", "a drill")
    shown = project.ran(week.root, "gto", "show")
    week.holds("`cf rollback v0.0.2` promotes it again, for gto too", promoted(week) == past and f" {past} " in shown)
    week.machine.command("flows.night.promotion", "promote", now, "--why", "the drill is over")
    week.holds(f"`cf promote {now}` brings the best one back", promoted(week) == now)
