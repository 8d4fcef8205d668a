"""The clips of a night: clips.folder as earlier nights and people left it, and what arrived since."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.night import inbox as arrivals
from flows.night import warm_start
from flows.night.inbox import Arrivals
from flows.night.state import Work
from flows.project import dvc_lock, git


@task(name="new clips", cache_policy=NO_CACHE)
def _take(inbox: Path, folder: Path, settle: float) -> Arrivals:
    found, logger = arrivals.take(inbox, folder, settle=settle), get_run_logger()
    logger.info(f"{len(found.taken)} new, {found.known} known, {len(found.turned_away)} turned away")
    for name, why in found.turned_away.items():
        logger.warning(f"{name} {why}")
    return found


def take_clips(work: Work) -> None:
    """The folder as the last night left it, or as the tracked branch now has it, and what arrived since."""
    if work.folder is None:
        return
    root, pointer = work.root, f"{work.folder}.dvc"
    for ref in carried(work, pointer):
        git.git(root, "checkout", "--quiet", ref, "--", pointer)
        had = {file.relative_to(root / work.folder): file for file in (root / work.folder).rglob("*") if file.is_file()}
        aside = root / "work/clips"
        for name, file in had.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(aside / name)
        warm_start.restore(root, [pointer], work.line)
        if had:
            arrivals.take(aside, root / work.folder, settle=0.0)
    if work.settings.inbox is not None:
        inbox = work.repo / work.settings.inbox
        work.arrived = _take(inbox, root / work.folder, work.settings.settle)
    if any(file.is_file() for file in (root / work.folder).rglob("*")):
        warm_start.dvc(root, "add", "--quiet", work.folder)
        work.clips = next(out["md5"] for out in dvc_lock.here(root)[pointer])


def carried(work: Work, pointer: str) -> list[str]:
    """Commits whose clips go in: the tracked branch's; the last night's; both, where both changed since they parted."""
    repo, last = work.repo, work.past[-1].ref if work.past else None
    mine = file_at(repo, work.base, pointer)
    theirs = file_at(repo, last, pointer) if last else None
    if last is None or theirs is None or theirs == mine:
        return [work.base] if mine else []
    parted = git.git(repo, "merge-base", work.base, last).strip()
    before = file_at(repo, parted, pointer)
    if mine in (None, before):
        return [last]
    return [work.base] if theirs == before else [work.base, last]


def file_at(repo: Path, ref: str, path: str) -> str | None:
    try:
        return git.git(repo, "show", "--end-of-options", f"{ref}:{path}")
    except RuntimeError:
        return None
