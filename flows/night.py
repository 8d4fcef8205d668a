"""The steps of a night (flows/nightly.py), each on its worktree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from flows import arrivals, gate, handover, judged, locked, pipeline, registry, shown, stages, warm, worktree
from flows.arrivals import Arrivals
from flows.nights import GATE, RECORD, Night
from flows.registry import Version

STUDENT = "stage2"
COMMITTED = ["dvc.yaml", "dvc.lock", "params.yaml", "metrics", "nightly", warm.POINTER, ".gitignore"]


class Settings(BaseModel):
    """What flows needs of params.yaml's section `nightly`; tasks/params_nightly.py says what each means, and checks them."""

    timezone: str
    branch: str
    inbox: Path | None
    settle: float
    weekly: str
    keep: list[str]
    rules: list[gate.Rule]
    push_timeout: float
    push_again_after: list[float]


@dataclass
class Work:
    """A night in the making."""

    repo: Path
    root: Path
    date: str
    run: str
    base: str
    settings: Settings
    folder: str | None  # clips.folder, if DVC tracks it
    full: bool
    before: Version | None  # the promoted student
    past: list[Night]
    line: Callable[[str], None]
    arrived: Arrivals = field(default_factory=Arrivals)
    clips: str | None = None  # md5 of `folder`
    data: dict[str, str] = field(default_factory=dict)


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
        worktree.git(root, "checkout", "--quiet", ref, "--", pointer)
        had = {file.relative_to(root / work.folder): file for file in (root / work.folder).rglob("*") if file.is_file()}
        aside = root / "work/clips"
        for name, file in had.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(aside / name)
        warm.restore(root, [pointer], work.line)
        if had:
            arrivals.take(aside, root / work.folder, settle=0.0)
    if work.settings.inbox is not None:
        inbox = work.repo / work.settings.inbox
        work.arrived = _take(inbox, root / work.folder, work.settings.settle)
    if any((root / work.folder).rglob("*")):
        warm.dvc(root, "add", "--quiet", work.folder)
        work.clips = next(out["md5"] for out in locked.here(root)[pointer])


def carried(work: Work, pointer: str) -> list[str]:
    """Commits whose clips go in: the tracked branch's; the last night's; both, where both changed since they parted."""
    repo, last = work.repo, work.past[-1].ref if work.past else None
    mine = _file(repo, work.base, pointer)
    theirs = _file(repo, last, pointer) if last else None
    if last is None or theirs is None or theirs == mine:
        return [work.base] if mine else []
    parted = worktree.git(repo, "merge-base", work.base, last).strip()
    before = _file(repo, parted, pointer)
    if mine in (None, before):
        return [last]
    return [work.base] if theirs == before else [work.base, last]


def anything_new(work: Work) -> bool:
    """A warm night needs new clips; a full one new clips or new code since the last full one."""
    since = [night for night in work.past if night.kind == "full" or not work.full]
    if not since:
        return True
    return work.clips != since[-1].clips or (work.full and work.base != since[-1].base)


def begin(work: Work) -> None:
    if work.full:
        warm.fresh(work.root, work.settings.keep)
        if work.before:
            warm.bring(work.repo, work.root, work.before, work.line)
    elif work.before:
        warm.start(work.repo, work.root, work.before, work.settings.keep, work.line)


def candidate(work: Work) -> tuple[str, str, str | None]:
    """Outcome, why, and the version that the candidate became."""
    known = [stage for stage in stages.stages(work.root) if not stage.frozen]
    first = [stage.name for stage in stages.selected(known, last=STUDENT) if stage.name != STUDENT]
    pipeline.repro(work.root, only=first, run=work.run, repo=work.repo)
    near = next(stage for stage in known if stage.name == STUDENT).upstream
    made = locked.here(work.root)
    work.data = {out["path"]: out["md5"] for name in near if name in first and not name.endswith(".dvc") for out in made.get(name, [])}
    # of a full night more is written down: all that stage 2 needs was made then
    if not work.full and work.past and work.data.items() <= work.past[-1].data.items():
        return close(work, "no good clips", f"{len(work.arrived.taken)} new files, and the filter kept none of them{_rejected(work)}", None)
    pipeline.repro(work.root, only=[stage.name for stage in known if stage.name not in first], run=work.run, repo=work.repo)
    md5 = next(str(out["md5"]) for out in locked.here(work.root)[STUDENT] if out["path"] == registry.WEIGHTS)
    if work.before and md5 == work.before.about.get("md5"):
        return close(work, "the same again", f"the student is {work.before.name}, byte for byte", md5)
    if found := locked.problems(work.root, [STUDENT, *([warm.POINTER] if work.before else [])]):
        raise RuntimeError(f"not judged: {found[0]}")
    verdict = judge(work)
    return close(work, "promoted" if verdict.promote else "refused", verdict.why, md5, verdict)


def judge(work: Work) -> gate.Verdict:
    """Candidate and promoted student, each a task, and then the gate."""
    root, given = work.root, {"run": work.run, "repo": work.repo}
    mine = _measure.with_options(task_run_name="judge candidate")(
        root, "candidate", student=root / registry.WEIGHTS, codec=root / warm.CODEC, **given
    )
    theirs = None
    if work.before:
        theirs = _measure.with_options(task_run_name=f"judge {work.before.name}")(
            root, "promoted", student=root / warm.STUDENT, codec=root / warm.ITS_CODEC, version=work.before.name, **given
        )
    verdict = gate.judge(mine, theirs, work.settings.rules)
    verdict.write(root / GATE)
    shown.table([finding.model_dump() for finding in verdict.findings], "gate", verdict.why, get_run_logger().warning)
    return verdict


@task(name="judge", cache_policy=NO_CACHE)
def _measure(root: Path, name: str, **given: Any) -> gate.Judged:
    return judged.measure(root, name, line=get_run_logger().info, **given)


def close(work: Work, outcome: str, why: str, md5: str | None, verdict: gate.Verdict | None = None) -> tuple[str, str, str | None]:
    """The night's commit; then, if it is to be, version and promotion; and its branch, which says that it has ended."""
    version = None
    record = Night(
        date=work.date,
        kind="full" if work.full else "warm",
        base=work.base,
        clips=work.clips,
        data=work.data,
        arrived=work.arrived.taken,
        turned_away=work.arrived.turned_away,
        rejected=_counts(work.root),
        outcome=outcome,
        why=why,
        candidate=md5,
        before=work.before.name if work.before else None,
        run=work.run,
    )
    (work.root / RECORD).parent.mkdir(exist_ok=True)
    (work.root / RECORD).write_text(record.text())
    if verdict is None:
        (work.root / GATE).unlink(missing_ok=True)
    worktree.git(work.root, "add", "--update")
    pointers = [f"{work.folder}.dvc"] if work.folder else []
    commit = worktree.commit(work.root, [*COMMITTED, *pointers], f"nightly {work.date}: {outcome}")
    # what a crash leaves here: a candidate that is promoted, and whose night counts as not ended; the next one goes on from it
    handover.add(work.repo, f"nightly/{work.date}")
    if outcome == "promoted" and verdict:
        numbers = {finding.metric: finding.candidate for finding in verdict.findings}
        about = {"by": "nightly", "date": work.date, "run": work.run, "metrics": numbers, "why": why}
        version = registry.register(work.repo, commit, about)
        registry.assign(work.repo, version, {"by": "nightly", "date": work.date, "run": work.run, "why": why})
    worktree.git(work.repo, "branch", f"nightly/{work.date}", commit)
    work.line(f"nightly/{work.date} is {commit[:12]}: {outcome}, {why}")
    return outcome, why, version.name if version else None


def _file(repo: Path, ref: str, path: str) -> str | None:
    try:
        return worktree.git(repo, "show", "--end-of-options", f"{ref}:{path}")
    except RuntimeError:
        return None


def _counts(root: Path) -> dict[str, int]:
    """By the filter's metrics."""
    try:
        found = json.loads((root / "metrics/filter.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name.removeprefix("rejected_"): int(value) for name, value in found.items() if name.startswith("rejected_") and value}


def _rejected(work: Work) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in _counts(work.root).items())
    return f" (of all clips it rejects {counts})" if counts else ""
