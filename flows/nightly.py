"""Every night: new clips in, a student trained from the promoted one, both judged, the better one promoted, all of it handed over.

A night works in a worktree of its own at the tracked branch, and leaves a branch nightly/DATE with dvc.lock, nightly/gate.json and
nightly/record.json. What it may decide stands in params.yaml's section `nightly`. It ends as one of: Promoted, Refused, NoNewData,
NoGoodClips, TheSameAgain; NotPushed, when that could not be handed over; StillRunning, when the last one is; or it fails.
"""

from __future__ import annotations

import fcntl
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

from flows import alerts, handover, overrides, pipeline, reconcile, registry, warm, worktree
from flows.night import Settings, Work, anything_new, begin, candidate, take_clips
from flows.nights import free, nights

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
    repo, logger = Path.cwd().resolve(), get_run_logger()
    with alone(repo) as ours:
        if not ours:
            return Completed(name="StillRunning", message="the night before is still at work; this one leaves it alone")
        name, said = night(repo, date, full, logger.info)
        late = send(repo, settings(_stated(repo)), logger.info)
        alerts.ended(repo, name, good=True)
        if late:
            alerts.send("not pushed", late, logger.info, date=date)
            return Completed(name="NotPushed", message=f"{name}: {said}. {late}")
        return Completed(name=name, message=said)


def night(repo: Path, date: str | None, full: bool, line: Callable[[str], None]) -> tuple[str, str]:
    """Its outcome and one sentence."""
    work = prepare(repo, date, full, line)
    with worktree.alone(work.root, str(runtime.flow_run.id)):
        take_clips(work)
        if not full and not anything_new(work):
            worktree.git(repo, "worktree", "remove", "--force", str(work.root))
            worktree.git(repo, "branch", "--quiet", "-D", f"run/{work.root.name}")
            away = f"; {len(work.arrived.turned_away)} were turned away" if work.arrived.turned_away else ""
            return "NoNewData", f"no new clips since {work.past[-1].date if work.past else 'ever'}{away}"
        begin(work)
        outcome, said, version = candidate(work)
    alerts.send(outcome, f"nightly {work.date} {outcome}: {said}", line, date=work.date, version=version)
    for folder in worktree.prune(repo, line=line):
        line(f"removed the worktree {folder}; its branch stays")
    return NAMES[outcome], said


def prepare(repo: Path, date: str | None, full: bool, line: Callable[[str], None]) -> Work:
    """Whose turn it is: tracked branch, kind of night, and a worktree. A flow run that is retried finds the one it had."""
    try:
        handover.fetch(repo, settings(_stated(repo)).push_timeout)
    except RuntimeError as error:
        line(f"origin could not be asked, so the night goes by what is here: {error}")
    tidy(repo, line)
    base = tracked(repo, settings(_stated(repo)).branch)
    stated = overrides.read(worktree.git(repo, "show", f"{base}:params.yaml"))
    ours, past, before = settings(stated), nights(repo), registry.promoted(repo)
    date = date or datetime.now(ZoneInfo(ours.timezone)).date().isoformat()
    root = worktree.make(repo, f"nightly-{date}-{str(runtime.flow_run.id)[:8]}", base=base, profile=None, overrides={})
    pipeline.check(root)
    why = "it was asked for" if full else f"{ours.weekly} is the day" if _weekday(date) == ours.weekly else None
    why = why or ("nothing is promoted yet" if before is None else warm.can_be_kept(repo, root, before, ours.keep))
    kind = f"a full night, because {why}" if why else f"a warm night, from {before and before.name}"
    line(f"{date}: {kind}; {ours.branch} is {base[:12]}")
    clips = stated["clips"]
    folder = str(clips["folder"]) if clips["source"] == "folder" and not Path(clips["folder"]).is_absolute() else None
    return Work(repo, root, free(repo, date), str(runtime.flow_run.name), base, ours, folder, bool(why), before, past, line)


def send(repo: Path, stated: Settings, line: Callable[[str], None]) -> str | None:
    return handover.send(repo, timeout=stated.push_timeout, pauses=stated.push_again_after, line=line)


def tidy(repo: Path, line: Callable[[str], None]) -> None:
    """Folders of nights that failed, but for the last one, to look at: each holds a copy of the clips. All they made is in the cache."""
    folders = [folder for folder in worktree.found(repo) if folder.name.startswith("nightly-") and not worktree.in_use(folder)]
    failed = [folder for folder in folders if worktree.git(folder, "status", "--porcelain", "--untracked-files=no").strip()]
    for folder in failed[1:]:
        worktree.git(repo, "worktree", "remove", "--force", str(folder))
        line(f"removed {folder.name}, whose night failed")


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


def settings(stated: dict[str, Any]) -> Settings:
    return Settings.model_validate(stated["nightly"])


def _stated(repo: Path) -> dict[str, Any]:
    return overrides.read((repo / "params.yaml").read_text())


def tracked(repo: Path, branch: str) -> str:
    """Of the branch here and at origin, the one that has the other's commits; the one here where they have parted."""
    found = []
    for ref in (f"refs/heads/{branch}", f"refs/remotes/origin/{branch}"):
        if worktree.git(repo, "for-each-ref", ref).strip():
            found.append(worktree.git(repo, "rev-parse", "--verify", ref).strip())
    if not found:
        raise ValueError(f"nightly.branch is {branch}, which is neither here nor at origin; name a branch that is")
    here, there = found[0], found[-1]
    return there if worktree.git(repo, "merge-base", here, there).strip() == here else here


def _weekday(date: str) -> str:
    return calendar.fromisoformat(date).strftime("%A").lower()


if __name__ == "__main__":
    nightly()
