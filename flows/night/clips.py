"""The clips of a night: clips.folder as earlier nights and people left it, and what arrived since."""

import shutil
import sys
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.night.inbox import Arrivals, copy_new_clips
from flows.night.state import NightPlan, NightState
from flows.night.warm_start import restore_targets
from flows.project import dvc_lock, git
from flows.project.dvc_command import run_dvc
from flows.supervise.command import run_logged
from flows.supervise.environment import stage_environment
from tasks.files.json_lines import read_json_object

DRIFT = "nightly/drift.html"


@task(name="new clips", cache_policy=NO_CACHE)
def _copy_from_inbox(inbox: Path, folder: Path, settle: float) -> Arrivals:
    arrivals, logger = copy_new_clips(inbox, folder, settle=settle), get_run_logger()
    logger.info(f"{len(arrivals.copied)} new, {arrivals.duplicates} known, {len(arrivals.turned_away)} turned away")
    for name, why in arrivals.turned_away.items():
        logger.warning(f"{name} {why}")
    return arrivals


def gather_clips(night: NightState) -> None:
    """Fill the worktree's clips folder: from the last night, from the tracked branch, then from the inbox; track it by `dvc add`."""
    plan = night.plan
    if plan.clips_folder is None:
        return
    folder, pointer = plan.root / plan.clips_folder, f"{plan.clips_folder}.dvc"
    for ref in commits_with_clips(plan, pointer):
        git.run_git(plan.root, "checkout", "--quiet", ref, "--", pointer)
        # DVC replaces the folder: what a first commit put there is moved aside, and added again after the second one's clips
        aside = plan.root / "work/clips"
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            aside.parent.mkdir(exist_ok=True)
            folder.rename(aside)
        restore_targets(plan.root, [pointer], plan.log)
        if aside.exists():
            copy_new_clips(aside, folder, settle=0.0)
    if plan.settings.inbox is not None:
        night.arrivals = _copy_from_inbox(plan.repo / plan.settings.inbox, folder, plan.settings.settle)
    if any(file.is_file() for file in folder.rglob("*")):
        run_dvc(plan.root, "add", plan.clips_folder)
        night.clips = next(out["md5"] for out in dvc_lock.read_outs(plan.root)[pointer])


def compare_with_training_set(night: NightState) -> None:
    """Write nightly/drift.html and drift.json: which of the filter's rules tonight's clips moved; a night that drifts says so."""
    plan, names, page = night.plan, night.plan.root / "work/arrived.txt", night.plan.root / DRIFT
    page.unlink(missing_ok=True)  # of the night that this one's base was merged from
    page.with_suffix(".json").unlink(missing_ok=True)
    if not night.arrivals.copied:
        return
    names.parent.mkdir(exist_ok=True)
    names.write_text("".join(f"{name}\n" for name in night.arrivals.copied), encoding="utf-8")
    words = [sys.executable, "-m", "tasks", "drift", "--new", str(names), "--out", DRIFT]
    environment = stage_environment(plan.run, plan.root, plan.repo) | {"PYTHONPATH": str(plan.root)}
    code, _ = run_logged(words, log=plan.log, cwd=plan.root, env=environment)
    found = read_json_object(page.with_suffix(".json"))
    if code == 0 and any(finding["drifted"] for finding in found.get("findings", [])):
        night.drift = str(found["sentence"])


def commits_with_clips(plan: NightPlan, pointer: str) -> list[str]:
    """Return the commits whose clips go in: the tracked branch's, the last night's, or both if both changed since they parted."""
    last = plan.past[-1].ref if plan.past else None
    of_branch = git.read_committed(plan.repo, plan.base, pointer)
    of_night = git.read_committed(plan.repo, last, pointer) if last else None
    if last is None or of_night is None or of_night == of_branch:
        return [plan.base] if of_branch else []
    parted = git.run_git(plan.repo, "merge-base", plan.base, last).strip()
    before = git.read_committed(plan.repo, parted, pointer)
    if of_branch in (None, before):
        return [last]
    return [plan.base] if of_night == before else [plan.base, last]
