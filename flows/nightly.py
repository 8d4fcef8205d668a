"""Every night: new clips in, a student trained from the promoted one, both judged, the better one promoted, all of it handed over.

A night works in a worktree of its own at the tracked branch, and leaves a branch nightly/DATE with dvc.lock, nightly/gate.json and
nightly/record.json. What it may decide stands in params.yaml's section `nightly`. It ends as one of: Promoted, Refused, NoNewData,
NoGoodClips, TheSameAgain; NotPushed, when that could not be handed over; StillRunning, when the last one is; or it fails.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date as calendar
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows import pipeline
from flows.machine import alerts, reconcile
from flows.night import handover, warm_start
from flows.night.clips import take_clips
from flows.night.records import Night, free, nights
from flows.night.state import Work, checked, folder_of, settings
from flows.night.steps import anything_new, begin, candidate
from flows.project import git, overrides, registry, run_lock, worktree
from flows.supervise import command

LOCK = Path(".runs/nightly.lock")
NAMES = {"promoted": "Promoted", "refused": "Refused", "no good clips": "NoGoodClips", "the same again": "TheSameAgain"}

Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="Of the night; default: today, in nightly.timezone.")]


@flow(
    name="nightly",
    on_failure=[alerts.on_failure],
    on_crashed=[reconcile.close_tasks, alerts.on_crashed],
    on_cancellation=[reconcile.close_tasks],
)
def nightly(date: Date | None = None, full: bool = False) -> State[None]:
    """One night. `full`: everything anew, whatever day it is."""
    return pipeline.framed(lambda: _whole(date, full))


def _whole(date: str | None, full: bool) -> State[None]:
    repo, line = Path.cwd().resolve(), get_run_logger().info
    with alone(repo) as ours:
        if not ours:
            return Completed(name="StillRunning", message="the night before is still at work; this one leaves it alone")
        work = prepare(repo, date, full, line)
        name, said = night(work, asked=full)
        # the night has ended, perhaps with a promotion: what goes wrong from here on does not make it one that failed
        _safely(lambda: tell(work, name, said), line)
        late = _safely(lambda: send(work), line)
        _safely(lambda: end(work, name, late), line)
        return Completed(name="NotPushed", message=f"{name}: {said}. {late}") if late else Completed(name=name, message=said)


def night(work: Work, *, asked: bool) -> tuple[str, str]:
    """Its outcome and one sentence."""
    repo = work.repo
    with run_lock.alone(work.root, str(runtime.flow_run.id)):
        take_clips(work)
        if (work.folder and not work.clips) or not (asked or anything_new(work)):
            git.git(repo, "worktree", "remove", "--force", str(work.root))
            git.git(repo, "branch", "--quiet", "-D", f"run/{work.root.name}")
            away = f"; {len(work.arrived.turned_away)} were turned away" if work.arrived.turned_away else ""
            return "NoNewData", (f"no new clips since {work.past[-1].date}" if work.past else "no clips yet") + away
        begin(work)
        outcome, said, work.made = candidate(work)
    return NAMES[outcome], said


def prepare(repo: Path, date: str | None, full: bool, line: Callable[[str], None]) -> Work:
    """Whose turn it is: tracked branch, kind of night, and a worktree. A flow run that is retried finds the one it had, with what it
    began from. All but the branch's name is stated by that branch; the checkout, which somebody may be editing, decides nothing."""
    checked_date(date)
    handover.catch_up(repo, line)
    tidy(repo, line)
    branch = str(_stated(repo, "HEAD")["nightly"]["branch"])
    tip = tracked(repo, branch)
    date = date or datetime.now(ZoneInfo(settings(_stated(repo, tip)).timezone)).date().isoformat()
    root = worktree.make(repo, f"nightly-{date}-{str(runtime.flow_run.id)[:8]}", base=tip, profile=None, overrides={})
    base = git.git(root, "merge-base", "HEAD", tip).strip()
    pipeline.check(root)
    stated = _stated(repo, base)
    ours, folder, past, before = checked(stated), folder_of(stated), nights(repo), registry.promoted(repo)
    why = "it was asked for" if full else weekly(date, ours.weekly, past)
    why = why or ("nothing is promoted yet" if before is None else warm_start.can_be_kept(repo, root, before, ours.keep))
    kind = f"a full night, because {why}" if why else f"a warm night, from {before and before.name}"
    line(f"{date}: {kind}; {branch} is {base[:12]}")
    of_a_folder = stated["clips"]["source"] == "folder"
    run = str(runtime.flow_run.name)
    return Work(repo, root, free(repo, date), run, base, ours, of_a_folder, folder, bool(why), before, past, line)


def weekly(date: str, day: str, past: list[Night]) -> str | None:
    """Why a night is the week's full one. One that failed on its day is made up for."""
    today = calendar.fromisoformat(date)
    if today.strftime("%A").lower() == day:
        return f"{day} is the day"
    last = next((night.date for night in reversed(past) if night.kind == "full"), None)
    if last and (today - calendar.fromisoformat(last[:10])).days > 7:
        return f"the last full one was {last}"
    return None


def send(work: Work) -> str | None:
    ours = work.settings
    return handover.send(work.repo, timeout=ours.push_timeout, pauses=ours.push_again_after, line=work.line)


def tell(work: Work, name: str, said: str) -> None:
    if name != "NoNewData":
        outcome = next(outcome for outcome, state in NAMES.items() if state == name)
        alerts.send(outcome, f"nightly {work.date} {outcome}: {said}", work.line, date=work.date, version=work.made)


def end(work: Work, name: str, late: str | None) -> None:
    alerts.ended(work.repo, name, good=True)
    if late:
        alerts.send("not pushed", late, work.line, date=work.date)
    for folder in worktree.prune(work.repo, line=work.line):
        work.line(f"removed the worktree {folder}; its branch stays")


def _safely(do: Callable[[], str | None], line: Callable[[str], None]) -> str | None:
    try:
        return do()
    except Exception as error:
        said = f"after the night's end {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        line(said)
        return said


def tidy(repo: Path, line: Callable[[str], None]) -> None:
    """Folders of nights that failed, but for the last one, to look at: each holds a copy of the clips. All they made is in the cache."""
    folders = [folder for folder in worktree.found(repo) if folder.name.startswith("nightly-") and not run_lock.in_use(folder)]
    failed = [folder for folder in folders if _changed(folder)]
    for folder in failed[1:]:
        git.git(repo, "worktree", "remove", "--force", str(folder))
        line(f"removed {folder.name}, whose night failed")


def _changed(folder: Path) -> bool:
    try:
        return bool(git.git(folder, "status", "--porcelain", "--untracked-files=no").strip())
    except RuntimeError:  # not git's any more: the checkout was moved
        return False


# ------------------------------------------------------------------------------------------------------------ facts


@contextmanager
def alone(repo: Path) -> Iterator[bool]:
    """Whether this is the only night of the checkout. Freed by the kernel."""
    (repo / LOCK).parent.mkdir(exist_ok=True)
    with (repo / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def checked_date(date: str | None) -> None:
    """The form's pattern lets the 30th of February through."""
    try:
        calendar.fromisoformat(date or "2026-01-01")
    except ValueError:
        raise ValueError(f"{date} is no day of the calendar; write one as 2026-01-31") from None


def _stated(repo: Path, commit: str) -> dict[str, Any]:
    return overrides.read(git.git(repo, "show", f"{commit}:params.yaml"))


def tracked(repo: Path, branch: str) -> str:
    """Of the branch here and at origin, the one that has the other's commits; the one here where they have parted."""
    found = []
    for ref in (f"refs/heads/{branch}", f"refs/remotes/origin/{branch}"):
        if git.git(repo, "for-each-ref", ref).strip():
            found.append(git.git(repo, "rev-parse", "--verify", ref).strip())
    if not found:
        raise ValueError(f"nightly.branch is {branch}, which is neither here nor at origin; name a branch that is")
    here, there = found[0], found[-1]
    return there if git.git(repo, "merge-base", here, there).strip() == here else here


def main(argv: list[str]) -> None:
    about = "A night of this checkout, without a server. Its state is the last line; exit code 1, and one sentence, when it failed."
    parser = argparse.ArgumentParser("python -m flows.nightly", description=about)
    parser.add_argument("--date", help="YYYY-MM-DD; default: today, in nightly.timezone")
    parser.add_argument("--full", action="store_true", help="everything anew, whatever day it is")
    asked = parser.parse_args(argv)
    command.mark()
    try:
        checked_date(asked.date)
        state = nightly(date=asked.date, full=asked.full, return_state=True)
    except ValueError as error:
        sys.exit(f"nightly: {' '.join(str(error).split())}")
    if not state.is_completed():
        sys.exit(f"nightly: {(state.message or str(state.name)).splitlines()[0]}")
    print(f"{state.name}: {state.message}")


if __name__ == "__main__":
    main(sys.argv[1:])
