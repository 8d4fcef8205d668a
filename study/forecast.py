"""Which cells are missing, and about how many hours they take, by the seconds of the committed run of profile tiny."""

from collections.abc import Iterable
from pathlib import Path

from study.cells import CommittedCell, locate_cell
from study.nodes import MADE, ROOT, build_params, compute_cell_key, locate_weights, read_profile
from study.plan import Cell, Plan
from tasks.files.json_lines import load_json_object
from tasks.params.yaml_file import Refused

COMMITTED = ROOT / "benchmarks/results/tiny-runtime.json"
TRAININGS = ("base", "teacher", "causal_init", "stage1")
WARMING = 6.0  # seconds in which a process imports its libraries and DVC asks what has changed


def list_missing(plan: Plan, groups: Iterable[str] | None = None) -> list[Cell]:
    """List the cells of the plan, or of some of its groups, that are not committed or were made with other parameters."""
    named = list(groups or plan.groups)
    if unknown := [name for name in named if name not in plan.groups]:
        raise Refused(f"the plan has no group {unknown[0]}; its groups are {', '.join(plan.groups)}")
    wanted = {(plan.groups[name].world, arm, seed) for name in named for seed in plan.groups[name].seeds for arm in plan.groups[name].arms}
    return [cell for cell in plan.cells if (cell.world, cell.arm, cell.seed) in wanted and not is_made(plan, cell)]


def is_made(plan: Plan, cell: Cell) -> bool:
    """Say whether a cell is there, with the plan's parameters. Code that changed since makes no cell stale; the page counts it."""
    file = locate_cell(plan, cell)
    return file.exists() and CommittedCell(file).about["key"] == compute_cell_key(plan, cell)


def estimate_seconds(plan: Plan, cells: Iterable[Cell]) -> dict[Path, float]:
    """Estimate the seconds on one core of all that must be made, by what is made: each shared model counts once."""
    seconds = {stage: facts["wall_seconds"] for stage, facts in load_json_object(COMMITTED).items()}
    tiny = read_profile("tiny")
    videos = count_frames(tiny["generate"])
    out: dict[Path, float] = {}

    def add(path: Path, stage: str, share: float) -> None:
        if not path.exists():
            out[path] = WARMING + seconds[stage] * share

    for cell in cells:
        tree, weights = build_params(plan, cell.world, cell.seed, arm=cell.arm), locate_weights(plan, cell)
        clips = sum(seconds[stage] for stage in ("clips", "filter", "encode"))
        clips_folder = MADE / plan.profile / cell.world
        if not clips_folder.exists():
            out[clips_folder] = seconds["codec"] + seconds["prompts"] + clips * (1 + 2 * plan.reported / tiny["clips"]["count"])
        student = plan.trained_arm(cell.arm).student
        needed = {"teacher": ("base", "teacher"), "stage1": ("base", "causal_init", "stage1"), "stage2": TRAININGS}[student or "stage2"]
        for stage in needed:
            add(weights[stage], stage, tree[stage]["steps"] / tiny[stage]["steps"])
        if student == "stage2":
            add(weights["stage2"], "stage2", tree["stage2"]["steps"] / tiny["stage2"]["steps"])
        share = count_frames(tree["generate"]) / videos
        out[locate_cell(plan, cell)] = 2 * WARMING + share * (seconds["generate"] + seconds["evaluate"])
    return out


def count_frames(generate: dict) -> int:
    """Count the latent frames of all videos that a run generates, real clips among them."""
    prompts = generate["prompts"] * (generate["frames"] + sum(one["frames"] for one in generate["systems"].values()))
    return prompts + generate["continued"] * (generate["frames"] + sum(one["frames"] for one in generate["continuations"].values()))


def describe_hours(plan: Plan, missing: list[Cell]) -> str:
    """Return lines on what is missing and how long it takes: group by group, in the order in which they are run."""
    lines = [f"{len(plan.cells) - len(missing)} of {len(plan.cells)} cells are there or not asked for"]
    if plan.profile != "tiny":
        return f"{lines[0]}; {len(missing)} are missing. Only tiny has a committed run to forecast hours from: see `cf plan`"
    done: dict[Path, float] = {}
    for name, group in plan.groups.items():
        cells = [cell for cell in missing if cell.world == group.world and cell.seed in group.seeds and cell.arm in group.arms]
        new = {path: value for path, value in estimate_seconds(plan, cells).items() if path not in done}
        done |= new
        if cells:
            lines.append(f"  {name:<16} {len(cells):4} cells {sum(new.values()) / 3600:6.1f} h on one core")
    total = sum(done.values()) / 3600
    facts = load_json_object(COMMITTED)["stage2"]
    machine = f"{facts['cpu']}, load {facts['load'][0]:.0f} on {facts['cores']} cores"
    lines.append(f"  {'together':<16} {len(missing):4} cells {total:6.1f} h on one core, {total / 2:.1f} h with two seeds at once")
    return "\n".join([*lines, f"  (by the committed run's seconds: {machine})"])
