"""The steps of a night (flows/nightly.py), each on its worktree."""

from pathlib import Path

from prefect import get_run_logger

from flows.night import gate, handover, warm_start
from flows.night.clips import compare_with_training_set
from flows.night.judge import compare_students, measure_student
from flows.night.records import GATE, PROMPTS, RECORD, NightRecord, free_date
from flows.night.state import NightEnd, NightState
from flows.project import dvc_graph, dvc_lock, git, overrides, registry
from flows.project.dvc_graph import Stage
from flows.run.artifacts import show_table
from flows.run.repro import repro_stages
from tasks.files.json_lines import read_json_object
from tasks.files.words import count_things

STUDENT = "stage2"
COMMITTED = ["dvc.yaml", "dvc.lock", "params.yaml", "metrics", "nightly", warm_start.POINTER, ".gitignore"]


def has_news(night: NightState) -> bool:
    """Say whether there is anything to train on: for a warm night new clips; for a full one new clips or new code since the last one."""
    plan = night.plan
    if plan.clips_folder and not night.clips:
        return False
    since = [record for record in plan.past if record.kind == "full" or not plan.full]
    if not since:
        return True
    return night.clips != since[-1].clips or (plan.full and plan.base != since[-1].base)


def prepare_start(night: NightState) -> None:
    """Restore what training begins from: the promoted student, if there is one, and on a warm night all before stage 2."""
    plan = night.plan
    if plan.full:
        warm_start.start_full(plan.root)
        if plan.promoted:
            warm_start.restore_promoted(plan.repo, plan.root, plan.promoted, plan.log)
    elif plan.promoted:
        warm_start.start_warm(plan.repo, plan.root, plan.promoted, plan.settings.keep, plan.log)


def train_candidate(night: NightState) -> NightEnd:
    """Make the data, train a student from it, and let the gate decide. Raises RuntimeError when a stage fails or an out is damaged."""
    plan, root = night.plan, night.plan.root
    graph = dvc_graph.read_graph(root)
    stages = [stage for stage in graph if not stage.frozen]
    # 1. All that stage 2 needs. What the filter keeps of the new clips decides whether there is anything to train on.
    before = [stage for stage in dvc_graph.select_stages(stages, last=STUDENT) if stage.name != STUDENT]
    repro_stages(root, graph, before, run=plan.run, repo=plan.repo)
    compare_with_training_set(night)
    needed = next(stage for stage in stages if stage.name == STUDENT).upstream
    outs = dvc_lock.read_outs(root)
    data_stages = [stage.name for stage in before if stage.name in needed and not stage.name.endswith(".dvc")]
    night.data = {out["path"]: out["md5"] for name in data_stages for out in outs.get(name, [])}
    # a full night's record also lists base and teacher, so compare as a subset
    if not plan.full and plan.past and night.data.items() <= plan.past[-1].data.items():
        counts = ", ".join(f"{count} {reason}" for reason, count in _rejection_counts(root).items())
        why = f"{count_things(len(night.arrivals.copied), 'new file')}, of which the filter kept none"
        return close_night(night, "no good clips", why + (f" (of all clips it rejects {counts})" if counts else ""))
    # 2. The student, and what else the project makes of it.
    repro_stages(root, graph, [stage for stage in stages if stage not in before], run=plan.run, repo=plan.repo)
    outs = dvc_lock.read_outs(root)
    night.candidate = next(str(out["md5"]) for out in outs[STUDENT] if out["path"] == registry.WEIGHTS)
    if plan.promoted and night.candidate == plan.promoted.about.get("md5"):
        return close_night(night, "the same again", f"the student is {plan.promoted.name}, byte for byte")
    # 3. The gate, for the bytes that dvc.lock names: a damaged model is not measured.
    measured = [name for name, files in outs.items() if {registry.WEIGHTS, warm_start.CODEC} & {out["path"] for out in files}]
    if problems := dvc_lock.find_damage(root, [*measured, *([warm_start.POINTER] if plan.promoted else [])]):
        raise RuntimeError(f"not judged: {problems[0]}")
    night.verdict = judge_candidate(night, graph)
    return close_night(night, "promoted" if night.verdict.promote else "refused", night.verdict.why)


def judge_candidate(night: NightState, graph: list[Stage]) -> gate.Verdict:
    """Measure candidate and promoted student, each in a task of its own, apply the rules, and write gate.json."""
    plan, root, prompts = night.plan, night.plan.root, choose_prompts(night)
    stages = {stage.name: stage for stage in graph}

    def measure(name: str, student: str, codec: str, version: str | None = None) -> gate.Measured:
        judge = measure_student.with_options(task_run_name=f"judge {version or name}")
        return judge(plan, name, stages, student=root / student, codec=root / codec, prompts=prompts, version=version)

    mine = measure("candidate", registry.WEIGHTS, warm_start.CODEC)
    theirs = measure("promoted", warm_start.STUDENT, warm_start.ITS_CODEC, plan.promoted.name) if plan.promoted else None
    counted = read_json_object(root / "metrics/report.json").get("troubles", {})
    # A warm night did not train the stages that it keeps.
    troubles = sum(count for stage, count in counted.items() if plan.full or stage not in plan.settings.keep)
    pairs = compare_students(plan) if theirs else []
    verdict = gate.decide_promotion(mine, theirs, plan.settings.rules, troubles=troubles, pairs=pairs)
    verdict.write(root / GATE)
    if plan.from_folder and prompts is None:
        seed = mine.videos[0][1] if mine.videos else None
        captions = [prompt for prompt, its_seed in mine.videos if its_seed == seed]
        (root / PROMPTS).write_text("".join(f"{' '.join(caption.split())}\n" for caption in captions))
    show_table([finding.model_dump() for finding in verdict.findings], "gate", verdict.why, get_run_logger().warning)
    return verdict


def choose_prompts(night: NightState) -> Path | None:
    """Return the file of prompts that both students are shown, or None for the captions of held-out clips.

    The held-out clips of a folder change as clips arrive, and numbers of different prompts can't be compared. So the first night that
    measures writes their captions to nightly/prompts.txt on its branch, and later nights use that file, until params.yaml asks for
    other prompts. The captions of rendered clips don't change.
    """
    plan, settings, file = night.plan, night.plan.settings, night.plan.root / PROMPTS
    file.unlink(missing_ok=True)
    if settings.prompts_file or not plan.from_folder:
        return settings.prompts_file and plan.root / settings.prompts_file
    last = next((record for record in reversed(plan.past) if record.outcome in ("promoted", "refused")), None)
    if last is None:
        return None
    its_settings = overrides.parse_params(git.read_committed(plan.repo, last.ref, "params.yaml") or "{}").get("nightly", {})
    text = git.read_committed(plan.repo, last.ref, PROMPTS)
    if not text or (its_settings.get("prompts"), its_settings.get("prompts_file")) != (settings.prompts, None):
        return None
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def close_night(night: NightState, outcome: str, why: str) -> NightEnd:
    """Commit the night; register and promote the candidate if its outcome says so; then make the branch, which says that it has ended.

    A person who promotes or rolls back while the night is at work has decided: the candidate is refused, because it was compared with
    the student that was promoted before.
    """
    plan, verdict, why = night.plan, night.verdict, "; ".join(filter(None, [why, night.drift]))
    handover.try_fetch(plan.repo, plan.log)  # dates and versions that other machines took meanwhile
    date = free_date(plan.repo, plan.date)
    with registry.lock_registry(plan.repo):
        now = registry.find_promoted(plan.repo)
        if outcome == "promoted" and verdict and now != plan.promoted:
            outcome, then = "refused", f"{plan.promoted.name if plan.promoted else 'no student'} was promoted when this night began"
            why = f"{then}, and {now.name if now else 'none'} is now: someone decided meanwhile, and with that one it was not compared"
            verdict.model_copy(update={"promote": False, "why": why}).write(plan.root / GATE)
        commit = _commit_night(night, date, outcome, why)
        # A crash from here on leaves a promoted candidate and no branch: the night counts as not ended, and the next one goes on from it.
        handover.add_waiting(plan.repo, f"nightly/{date}")
        version = None
        if outcome == "promoted" and verdict:
            about = {"by": "nightly", "date": date, "run": plan.run, "why": why}
            metrics = {finding.metric: finding.candidate for finding in verdict.findings}
            version = registry.register_version(plan.repo, commit, {**about, "metrics": metrics})
            registry.assign_version(plan.repo, version, about)
    git.run_git(plan.repo, "branch", f"nightly/{date}", commit)
    plan.log(f"nightly/{date} is {commit[:12]}: {outcome}, {why}")
    return NightEnd(outcome, why, date, version.name if version else None)


def _commit_night(night: NightState, date: str, outcome: str, why: str) -> str:
    """Write the night's record and commit it with all that repeats the night; return the commit."""
    plan, root = night.plan, night.plan.root
    record = NightRecord(
        date=date, kind="full" if plan.full else "warm", base=plan.base, clips=night.clips, data=night.data,
        arrived=night.arrivals.copied, turned_away=night.arrivals.turned_away, rejected=_rejection_counts(root), outcome=outcome, why=why,
        candidate=night.candidate, before=plan.promoted.name if plan.promoted else None, run=plan.run,
    )  # fmt: skip
    (root / RECORD).parent.mkdir(exist_ok=True)
    (root / RECORD).write_text(record.to_json())
    if night.verdict is None:  # files of the night that this one's base was merged from
        for stale in (GATE, PROMPTS):
            (root / stale).unlink(missing_ok=True)
    git.run_git(root, "add", "--update")
    pointers = [f"{plan.clips_folder}.dvc"] if plan.clips_folder else []
    return git.commit_paths(root, [*COMMITTED, *pointers], f"nightly {date}: {outcome}")


def _rejection_counts(root: Path) -> dict[str, int]:
    """Return how many of all clips the filter rejects, by reason, from its metrics; nothing before the filter has run."""
    metrics = read_json_object(root / "metrics/filter.json")
    return {name.removeprefix("rejected_"): int(value) for name, value in metrics.items() if name.startswith("rejected_") and value}
