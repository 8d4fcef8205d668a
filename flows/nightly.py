"""Every night: new clips in, a student trained from the promoted one, both measured, the better one promoted, all of it handed over.

A night works in a worktree of its own at the tracked branch, and leaves a branch nightly/DATE with dvc.lock, nightly/gate.json and
nightly/record.json. What it may decide stands in params.yaml's section `nightly`. It ends as Promoted, Refused, NoNewData,
NoGoodClips or TheSameAgain; as NotPushed, when that could not be handed over; as StillRunning, when the night before is at work; or
it fails.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date as calendar
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from filelock import AcquireReturnProxy, FileLock, Timeout
from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.machine import alerts, reconcile
from flows.night import handover, warm_start
from flows.night.clips import gather_clips
from flows.night.records import NightRecord, read_nights
from flows.night.state import NightEnd, NightPlan, NightSettings, NightState, check_settings, tracked_clips_folder
from flows.night.steps import has_news, prepare_start, train_candidate
from flows.project import git, overrides, registry, run_lock, worktree
from flows.run.frame import discard_worktree, run_framed, say_failures_once
from flows.run.repro import check_parameters
from flows.supervise import command

LOCK = Path(".runs/nightly.lock")
NOTHING_NEW = "nothing new"
# outcome of a night -> Prefect's name of the flow run's state
STATE_NAMES = {"promoted": "Promoted", "refused": "Refused", "no good clips": "NoGoodClips", "the same again": "TheSameAgain"}
STATE_NAMES |= {NOTHING_NEW: "NoNewData"}
Log = Callable[[str], None]
Date = Annotated[str, Field(pattern=r"^(\d{4}-\d{2}-\d{2})?$")]  # empty and not null, because Prefect's form then shows the field at once


@flow(
    name="nightly",
    on_failure=[alerts.on_failure],
    on_crashed=[reconcile.close_tasks, alerts.on_crashed],
    on_cancellation=[reconcile.close_tasks],
)
def nightly(date: Date = "", full: bool = False) -> State[None]:
    """Run one night.

    Args:
        date: Of the night, such as 2026-01-31; empty for today, in `nightly.timezone`.
        full: Train everything anew, whatever day it is.
    """
    return run_framed(lambda: _run_night(date, full))


def _run_night(date: str, full: bool) -> State[None]:
    repo, log = Path.cwd().resolve(), get_run_logger().info
    if not (lock := lock_night(repo)):
        return Completed(name="StillRunning", message="the night before is still at work; this one leaves it alone")
    with lock:
        plan = plan_night(repo, date, full, log)
        end = _work_through(plan, asked=full)
        # The night has ended, perhaps with a promotion: what goes wrong from here on is told and does not make it a failed night.
        name = STATE_NAMES[end.outcome]
        if end.outcome != NOTHING_NEW:
            alerts.send_alert(end.outcome, f"nightly {end.date} {end.outcome}: {end.why}", log, date=end.date, version=end.version)
        timeout, pauses = plan.settings.push_timeout, plan.settings.push_again_after
        late = _try_to(lambda: handover.send_waiting(repo, timeout=timeout, pauses=pauses, log=log), log)
        _try_to(lambda: _tidy_up(repo, end, late, log), log)
        return Completed(name="NotPushed", message=f"{name}: {end.why}. {late}") if late else Completed(name=name, message=end.why)


def plan_night(repo: Path, date: str, full: bool, log: Log) -> NightPlan:
    """Create tonight's worktree and decide whether it is a full or a warm night. Raises ValueError for settings that can't be met.

    Settings come from the tracked branch, and never from the working copy; the name of that branch comes from the checkout's last
    commit. A flow run that is tried again has the worktree, and the commit that it began from, of its first attempt.
    """
    check_date(date)
    handover.try_fetch(repo, log)
    remove_failed_worktrees(repo, log)
    branch = str(_read_parameters(repo, "HEAD")["nightly"]["branch"])
    tip = tracked_commit(repo, branch)
    timezone = NightSettings.model_validate(_read_parameters(repo, tip)["nightly"]).timezone
    date = date or datetime.now(ZoneInfo(timezone)).date().isoformat()
    root = worktree.make_worktree(repo, f"nightly-{date}-{str(runtime.flow_run.id)[:8]}", base=tip, profile=None, overrides={})
    base = git.run_git(root, "merge-base", "HEAD", tip).strip()
    check_parameters(root, run=str(runtime.flow_run.name), repo=repo)
    params = _read_parameters(repo, base)
    settings, past, promoted = check_settings(params), read_nights(repo), registry.find_promoted(repo)
    why = "it was asked for" if full else reason_for_full(date, settings.weekly, past)
    if not why:
        why = warm_start.reason_against_warm(repo, root, promoted, settings.keep) if promoted else "nothing is promoted yet"
    kind = f"a full night, because {why}" if why else f"a warm night, from {promoted and promoted.name}"
    log(f"{date}: {kind}; {branch} is {base[:12]}")
    return NightPlan(
        repo=repo, root=root, date=date, run=str(runtime.flow_run.name), base=base, settings=settings, full=bool(why), promoted=promoted,
        past=past, log=log, from_folder=params["clips"]["source"] == "folder", clips_folder=tracked_clips_folder(params),
    )  # fmt: skip


def _work_through(plan: NightPlan, *, asked: bool) -> NightEnd:
    """Take clips in, and train and judge a candidate if there is anything new or the night was `asked` for."""
    night = NightState(plan)
    with run_lock.hold_checkout(plan.root, str(runtime.flow_run.id)):
        gather_clips(night)
        if (plan.clips_folder and not night.clips) or not (asked or has_news(night)):
            discard_worktree(plan.repo, plan.root)
            away = len(night.arrivals.turned_away)
            why = f"no new clips since {plan.past[-1].date}" if plan.past else "no clips yet"
            return NightEnd(NOTHING_NEW, why + (f"; {away} turned away" if away else ""), plan.date)
        prepare_start(night)
        return train_candidate(night)


def _tidy_up(repo: Path, end: NightEnd, late: str | None, log: Log) -> None:
    """Write down that a night took place, send the heartbeat, alert if it could not be handed over, and remove old worktrees."""
    alerts.record_end(repo, STATE_NAMES[end.outcome], good=True)
    alerts.send_heartbeat(log)
    if late:
        alerts.send_alert("not pushed", late, log, date=end.date)
    for folder in worktree.prune_worktrees(repo, line=log):
        log(f"removed the worktree {folder}; its branch stays")


def _try_to(step: Callable[[], str | None], log: Log) -> str | None:
    """Return the step's result; log an exception and return it as a sentence."""
    try:
        return step()
    except Exception as error:
        message = f"after the night's end {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        log(message)
        return message


# What a night is planned by.


def lock_night(repo: Path) -> AcquireReturnProxy | None:
    """Take the lock that lets one night of a checkout work at a time; return None while another night has it."""
    (repo / LOCK).parent.mkdir(exist_ok=True)
    try:
        return FileLock(repo / LOCK).acquire(timeout=0)
    except Timeout:
        return None


def check_date(date: str) -> None:
    """Raise ValueError for a date that is not in the calendar: the form's pattern lets the 30th of February through."""
    try:
        calendar.fromisoformat(date or "2026-01-01")
    except ValueError:
        raise ValueError(f"{date} is no day of the calendar; write one as 2026-01-31") from None


def reason_for_full(date: str, day: str, past: list[NightRecord]) -> str | None:
    """Return why the calendar makes a night the week's full one, or None. A full night that failed on its day is made up for."""
    today = calendar.fromisoformat(date)
    if today.strftime("%A").lower() == day:
        return f"{day} is the day"
    last = next((record.date for record in reversed(past) if record.kind == "full"), None)
    if last and (today - calendar.fromisoformat(last[:10])).days > 7:
        return f"the last full one was {last}"
    return None


def tracked_commit(repo: Path, branch: str) -> str:
    """Return the tip of the tracked branch: here or at origin, whichever has the other's commits; here where they have parted."""
    refs = [f"refs/heads/{branch}", f"refs/remotes/origin/{branch}"]
    tips = [git.run_git(repo, "rev-parse", "--verify", ref).strip() for ref in refs if git.run_git(repo, "for-each-ref", ref).strip()]
    if not tips:
        raise ValueError(f"nightly.branch is {branch}, which is neither here nor at origin; name a branch that is")
    here, at_origin = tips[0], tips[-1]
    return at_origin if git.run_git(repo, "merge-base", here, at_origin).strip() == here else here


def _read_parameters(repo: Path, commit: str) -> dict[str, Any]:
    return overrides.parse_params(git.run_git(repo, "show", f"{commit}:params.yaml"))


def remove_failed_worktrees(repo: Path, log: Log) -> None:
    """Remove the worktrees of failed nights but the last one, which is there to look at: each holds a copy of the clips.

    A failed night's worktree has uncommitted changes. What its stages made is in DVC's cache.
    """
    folders = [folder for folder in worktree.list_worktrees(repo) if folder.name.startswith("nightly-") and not run_lock.is_in_use(folder)]
    failed = []
    for folder in folders:
        with suppress(RuntimeError):  # of a checkout that was moved: the folder is no worktree of git's any more
            if git.run_git(folder, "status", "--porcelain", "--untracked-files=no").strip():
                failed.append(folder)
    for folder in failed[1:]:
        git.run_git(repo, "worktree", "remove", "--force", str(folder))
        log(f"removed {folder.name}, whose night failed")


def main(argv: list[str]) -> None:
    """Run one night; print its state, or exit with one sentence when it fails."""
    about = "A night of this checkout, without a server. Its state is the last line on stdout; exit code 1 and a sentence when it failed."
    parser = argparse.ArgumentParser("python -m flows.nightly", description=about)
    parser.add_argument("--date", default="", help="YYYY-MM-DD; default: today, in nightly.timezone")
    parser.add_argument("--full", action="store_true", help="everything anew, whatever day it is")
    args = parser.parse_args(argv)
    command.mark_environment()
    say_failures_once()
    try:
        check_date(args.date)
        state = nightly(date=args.date, full=args.full, return_state=True)
    except ValueError as error:
        sys.exit(f"nightly: {' '.join(str(error).split())}")
    if not state.is_completed():
        sys.exit(f"nightly: {(state.message or str(state.name)).splitlines()[0]}")
    print(f"{state.name}: {state.message}")


if __name__ == "__main__":
    main(sys.argv[1:])
