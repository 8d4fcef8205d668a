"""The steps of a night (flows/nightly.py), each on its worktree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows import pipeline
from flows.night import gate, handover, warm_start
from flows.night import judge as judged
from flows.night.clips import file_at
from flows.night.records import GATE, PROMPTS, RECORD, Night, free
from flows.night.state import Work
from flows.project import dvc_graph, dvc_lock, git, overrides, registry
from flows.run import artifacts

STUDENT = "stage2"
COMMITTED = ["dvc.yaml", "dvc.lock", "params.yaml", "metrics", "nightly", warm_start.POINTER, ".gitignore"]


def anything_new(work: Work) -> bool:
    """A warm night needs new clips; a full one new clips or new code since the last full one; both, any clips at all."""
    if work.folder and not work.clips:
        return False
    since = [night for night in work.past if night.kind == "full" or not work.full]
    if not since:
        return True
    return work.clips != since[-1].clips or (work.full and work.base != since[-1].base)


def begin(work: Work) -> None:
    if work.full:
        warm_start.fresh(work.root, work.settings.keep)
        if work.before:
            warm_start.bring(work.repo, work.root, work.before, work.line)
    elif work.before:
        warm_start.start(work.repo, work.root, work.before, work.settings.keep, work.line)


def candidate(work: Work) -> tuple[str, str, str | None]:
    """Outcome, why, and the version that the candidate became."""
    known = [stage for stage in dvc_graph.stages(work.root) if not stage.frozen]
    first = [stage.name for stage in dvc_graph.selected(known, last=STUDENT) if stage.name != STUDENT]
    pipeline.repro(work.root, only=first, run=work.run, repo=work.repo)
    near = next(stage for stage in known if stage.name == STUDENT).upstream
    made = dvc_lock.here(work.root)
    work.data = {out["path"]: out["md5"] for name in near if name in first and not name.endswith(".dvc") for out in made.get(name, [])}
    # of a full night more is written down: all that stage 2 needs was made then
    if not work.full and work.past and work.data.items() <= work.past[-1].data.items():
        return close(work, "no good clips", f"{len(work.arrived.taken)} new files, and the filter kept none of them{_rejected(work)}", None)
    pipeline.repro(work.root, only=[stage.name for stage in known if stage.name not in first], run=work.run, repo=work.repo)
    md5 = next(str(out["md5"]) for out in dvc_lock.here(work.root)[STUDENT] if out["path"] == registry.WEIGHTS)
    if work.before and md5 == work.before.about.get("md5"):
        return close(work, "the same again", f"the student is {work.before.name}, byte for byte", md5)
    used = [name for name, outs in dvc_lock.here(work.root).items() if {registry.WEIGHTS, warm_start.CODEC} & {out["path"] for out in outs}]
    if found := dvc_lock.problems(work.root, [*used, *([warm_start.POINTER] if work.before else [])]):
        raise RuntimeError(f"not judged: {found[0]}")
    verdict = judge(work)
    return close(work, "promoted" if verdict.promote else "refused", verdict.why, md5, verdict)


def judge(work: Work) -> gate.Verdict:
    """Candidate and promoted student, each a task, and then the gate."""
    root, asked = work.root, prompts(work)
    given = {"run": work.run, "repo": work.repo, "prompts": asked}
    mine = _measure.with_options(task_run_name="judge candidate")(
        root, "candidate", student=root / registry.WEIGHTS, codec=root / warm_start.CODEC, **given
    )
    theirs = None
    if work.before:
        theirs = _measure.with_options(task_run_name=f"judge {work.before.name}")(
            root, "promoted", student=root / warm_start.STUDENT, codec=root / warm_start.ITS_CODEC, version=work.before.name, **given
        )
    verdict = gate.judge(mine, theirs, work.settings.rules)
    verdict.write(root / GATE)
    if work.of_a_folder and asked is None:
        (root / PROMPTS).write_text("".join(f"{' '.join(prompt.split())}\n" for prompt, seed in mine.shown if seed == mine.shown[0][1]))
    artifacts.table([finding.model_dump() for finding in verdict.findings], "gate", verdict.why, get_run_logger().warning)
    return verdict


def prompts(work: Work) -> Path | None:
    """Of a folder's clips the held-out ones change as clips arrive; their captions as the first night that judged found them are kept
    and are asked for from then on, until params.yaml asks for others. None: the captions, which of rendered clips don't change."""
    ours, kept = work.settings, work.root / PROMPTS
    kept.unlink(missing_ok=True)
    if ours.prompts_file or not work.of_a_folder:
        return ours.prompts_file and work.root / ours.prompts_file
    for night in reversed([night for night in work.past if night.outcome in ("promoted", "refused")]):
        then = overrides.read(file_at(work.repo, night.ref, "params.yaml") or "{}").get("nightly", {})
        text = file_at(work.repo, night.ref, PROMPTS)
        if not text or (then.get("prompts"), then.get("prompts_file")) != (ours.prompts, None):
            return None
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
        return kept
    return None


@task(name="judge", cache_policy=NO_CACHE)
def _measure(root: Path, name: str, **given: Any) -> gate.Judged:
    return judged.measure(root, name, line=get_run_logger().info, **given)


def close(work: Work, outcome: str, why: str, md5: str | None, verdict: gate.Verdict | None = None) -> tuple[str, str, str | None]:
    """The night's commit; then, if it is to be, version and promotion; and its branch, which says that it has ended."""
    handover.catch_up(work.repo, work.line)  # names and promotions that others took meanwhile
    work.date = free(work.repo, work.date[:10])
    with registry.alone(work.repo):
        now = registry.promoted(work.repo)
        if outcome == "promoted" and verdict and now != work.before:
            outcome, then = "refused", f"{work.before.name if work.before else 'no student'} was promoted when this night began"
            why = f"{then}, and {now.name if now else 'none'} is now: someone decided meanwhile, and with that one it was not compared"
            verdict = verdict.model_copy(update={"promote": False, "why": why})
            verdict.write(work.root / GATE)
        commit = _committed(work, outcome, why, md5, judged=verdict is not None)
        # what a crash leaves here: a candidate that is promoted, and whose night counts as not ended; the next one goes on from it
        handover.add(work.repo, f"nightly/{work.date}")
        version = None
        if outcome == "promoted" and verdict:
            numbers = {finding.metric: finding.candidate for finding in verdict.findings}
            about = {"by": "nightly", "date": work.date, "run": work.run, "metrics": numbers, "why": why}
            version = registry.register(work.repo, commit, about)
            registry.assign(work.repo, version, {"by": "nightly", "date": work.date, "run": work.run, "why": why})
    git.git(work.repo, "branch", f"nightly/{work.date}", commit)
    work.line(f"nightly/{work.date} is {commit[:12]}: {outcome}, {why}")
    return outcome, why, version.name if version else None


def _committed(work: Work, outcome: str, why: str, md5: str | None, *, judged: bool) -> str:
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
    if not judged:
        for stale in (GATE, PROMPTS):
            (work.root / stale).unlink(missing_ok=True)
    git.git(work.root, "add", "--update")
    pointers = [f"{work.folder}.dvc"] if work.folder else []
    return git.commit(work.root, [*COMMITTED, *pointers], f"nightly {work.date}: {outcome}")


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
