"""What the report's page shows of a run: its systems in words, charts, tables, the filter's decisions. No file is read but videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cf_model.codec.interface import TIME

from . import failures, figures
from . import report as tables
from .cases import choose_cases
from .cells import SUITES
from .figures import Row
from .report import Results
from .trouble import CurveRule, find_troubles

Curves = Mapping[tuple[str, str, str], Any]  # suite, system, metric -> lists of second, mean, low and high
MOST_FAILURES = 200  # rows of the failure log
STAGES = {
    "validate": "checks every value of params.yaml",
    "clips": "renders worlds to video files, bad ones among them",
    "filter": "keeps clips longer than 10 s that pass the quality rules",
    "codec": "fits the codec: 4 frames to 1 latent, 8x in space",
    "encode": "clips to latents, captions to embeddings",
    "prompts": "the students' prompts, each once: captions, or a file",
    "base": "bidirectional model by flow matching",
    "teacher": "context teacher by error-recycling fine-tuning (sec. 3.4)",
    "causal_init": "few-step causal student, by teacher forcing or ODE regression",
    "stage1": "distribution matching on 21 latent frames (sec. 3.1)",
    "stage2": "contextual distribution matching with slow-fast memory (sec. 3.2, 3.3)",
    "generate": "videos of every system, prompt and seed",
    "evaluate": "metrics of the known world",
}


@runtime_checkable
class System(Protocol):
    """Weights, and the memory (a MemorySpec) or the view of the past (a TeacherView) that they generate with."""

    @property
    def weights(self) -> str: ...
    @property
    def memory(self) -> Any: ...
    @property
    def view(self) -> Any: ...


def stage_order(name: str) -> tuple[int, str]:
    """Return the sort key that brings stages into running order, unknown names last."""
    return (list(STAGES).index(name) if name in STAGES else len(STAGES), name)


def choose_colours(systems: Sequence[str]) -> dict[str, str]:
    """Return a colour for each system, the real clips grey."""
    names = [name for name in dict.fromkeys(systems) if name != "real"]
    return {name: figures.PALETTE[k % len(figures.PALETTE)] for k, name in enumerate(names)} | {"real": figures.GREY}


def list_troubles(training: Mapping[str, Sequence[Row]], rules: Sequence[CurveRule]) -> dict[str, list[str]]:
    """Return the sentences about curves that left their bounds, by stage in running order."""
    found = {stage: find_troubles(training.get(stage, []), rules) for stage in STAGES}
    return {stage: sentences for stage, sentences in found.items() if sentences}


def list_marks(params: Any) -> dict[str, list[figures.Mark]]:
    """List the moments that the charts over time mark, by suite: how long stage 2's videos were in training, and what its memory holds.

    The paper's context length is the frames that a pass attends to, in seconds of video.
    """
    fps, stage = params.video.fps, params.stage2
    trained = figures.begin_second(stage.horizon.longest, fps)
    marks = [figures.Mark(stage.memory.size * TIME / fps, "context"), figures.Mark(trained, "trained to")]
    return {"prompts": marks, "continuations": [figures.Mark(figures.begin_second(params.generate.prefix, fps), "real to"), *marks[1:]]}


def draw_curves(curves: Curves, colours: Mapping[str, str], marks: Mapping[str, Sequence[figures.Mark]]) -> dict[str, list[dict[str, Any]]]:
    """Draw the charts of the metrics over time by suite: a metric against time, with a line for each system and the suite's marks."""
    lines: dict[tuple[str, str], list[figures.Line]] = {}
    for (suite, system, metric), columns in curves.items():
        lines.setdefault((suite, metric), []).append(figures.Line(colours.get(system, figures.GREY), *columns))
    charts: dict[str, list[dict[str, Any]]] = {}
    for (suite, metric), drawn in lines.items():
        last = max(x for line in drawn for x in line.x)
        svg = figures.draw_chart(drawn, x="seconds", marks=[mark for mark in marks.get(suite, ()) if mark.at <= last])
        charts.setdefault(suite, []).append({"word": tables.describe_metric(metric), "svg": svg})
    return charts


def draw_training(stages: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Draw every value that the training stages logged, from their rows: faint as logged, and its running mean over a twentieth of them."""
    drawn = []
    for stage in sorted(stages, key=stage_order):
        rows, charts = stages[stage], []
        for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
            if found := figures.average_rows(rows, name):
                x, y, mean = found
                line, colour = figures.Line, figures.PALETTE[0]
                both = [line(colour, x.tolist(), y.tolist(), faint=True), line(colour, x[-len(mean) :].tolist(), mean.tolist())]
                svg = figures.draw_chart(both, x="step", log=figures.wants_logarithm(y))
                charts.append({"name": name.replace("_", " "), "last": float(mean[-1]), "svg": svg})
        drawn.append({"stage": stage, "charts": charts, "steps": rows[-1]["step"] if rows else 0})
    return drawn


def list_stages(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List the stages with what they do and the numbers that they wrote, from their metrics."""
    rows = []
    for name in dict.fromkeys([*STAGES, *sorted(metrics, key=stage_order)]):
        values = metrics.get(name, {})
        scalars = {key: value for key, value in values.items() if isinstance(value, int | float)}
        nested = len(values) > len(scalars)  # evaluate's: they have tables of their own
        rows.append({"stage": name, "does": STAGES.get(name, ""), "values": scalars, "absent": name not in metrics, "nested": nested})
    return rows


def summarise_filter(manifest: Sequence[Row], clips: Iterable[Row]) -> dict[str, Any]:
    """Summarise what the filter rejected and, where `clips` says which bad ones were planted, whether the filter was right."""
    planted = {row["id"]: row["planted"] for row in clips}
    rejected = [dict(row) | {"planted": planted.get(row["id"])} for row in manifest if not row["kept"]]
    return {
        "clips": len(manifest),
        "kept": sum(row["kept"] for row in manifest),
        "heldout": sum(row["split"] == "heldout" for row in manifest),
        "rejected": rejected,
        "reasons": Counter(row["reason"] for row in rejected).most_common(),
        "known": any(planted.values()),  # nobody knows which of a user's own clips are bad
        "missed": [row["id"] for row in manifest if row["kept"] and planted.get(row["id"])],
        "lost": [row["id"] for row in rejected if not row["planted"]],
        "planted": sum(bool(kind) for kind in planted.values()),
    }


def describe_system(system: System) -> str:
    """Describe a system in words: its weights, and what they see of the past."""
    if memory := system.memory:
        never = memory.promote == "none" or (memory.promote == "similarity" and memory.tau <= -1)
        slow = "slow 0, as nothing is promoted" if never else f"slow {memory.slow}"
        return f"{system.weights}, memory: sink {memory.sink}, {slow}, fast {memory.fast}"
    if view := system.view:
        frames = f"sink {view.sink}, slow {view.slow}{f' (every {view.stride}th)' if view.slow else ''}, fast {view.fast}"
        held = f"what a memory of sink {view.sink}, slow {view.slow}, fast {view.fast} holds if each tested chunk is kept"
        contexts = {"none": "nothing", "contiguous": f"the last {view.sink + view.slow + view.fast}", "sparse": frames, "memory": held}
        context = contexts[view.context]
        return f"{system.weights}, bidirectional, sees of the past: {context}"
    return system.weights


def name_memory(system: System) -> str:
    """Name what a teacher sees of the past, for `check_goals`, which compares two such systems."""
    past = system.memory or system.view
    if past is None or (system.view and system.view.context == "none"):
        return "none"
    if past.slow == 0:
        return "fast only"
    return "contiguous" if system.view and system.view.context == "contiguous" else "slow-fast"


def by_weights(systems: Mapping[str, System], present: Iterable[str]) -> dict[str, str]:
    """Return weights -> the system that stands for them: the system of that name, or the first."""
    representatives: dict[str, str] = {}
    here = [name for name in systems if name in set(present)]
    for name in sorted(here, key=lambda name: name != systems[name].weights):
        representatives.setdefault(systems[name].weights, name)
    return representatives


def systems_of(suite: str, stated: Mapping[str, System], index: Sequence[Row], results: Results) -> list[str]:
    """Return a suite's systems that have a video or a number, in the order of params.yaml, real last."""
    present = {row["system"] for row in index if row["suite"] == suite}
    present |= {system for s, system, _ in results.cells if s == suite} | set(results.means.get(suite, {}))
    return [name for name in [*stated, *sorted(present - {*stated, "real"}), "real"] if name in present]


def list_facts(params: Any, index: Sequence[Row], manifest: Sequence[Row], gallery_rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List the facts at the top of the page as (name, value); `params` are those of params.yaml."""
    prompts = [row for row in index if row["suite"] == "prompts" and row["system"] != "real"]
    prefixes = [row for row in index if row["suite"] == "continuations"]
    context, trained = params.stage2.teacher.context, params.teacher.view.context
    meant = f"{context}, though it was trained on {trained} (stage2.teacher.mismatch: accept)"
    mismatch = [("context shown to the teacher", meant)] if context not in ("none", trained) else []
    return [
        ("profile", params.profile),
        ("prompts", str(len({figures.item_key(row) for row in prompts}))),
        ("seeds a prompt", str(len({row["seed"] for row in prompts}))),
        ("longest video", f"{max((tile['seconds'] or 0 for row in gallery_rows for tile in row['tiles']), default=0):.1f} s"),
        ("real prefixes continued", str(len({figures.item_key(row) for row in prefixes}))),
        ("videos in all", str(len(index))),
        ("clips kept to train on", str(sum(row["split"] == "train" for row in manifest))),
        ("size and rate", f"{params.video.width} × {params.video.height}, {params.video.fps} fps"),
        *mismatch,
    ]


def build_claim(
    values: Results, index: Sequence[Row], stages: Mapping[str, Mapping[str, str]], teacher: str | None, clips: Iterable[Row], samples: Path
) -> dict[str, Any]:
    """Return what the page begins with: the worlds as teacher, stage 1 and stage 2 remember them, and stage 2 against stage 1."""
    truths = {row["id"]: row.get("truth") for row in clips}
    names = {"teacher": teacher, "stage 1": stages["stage1"].get("continuations"), "stage 2": stages["stage2"].get("continuations")}
    shown = {title: name for title, name in names.items() if name}
    rows = tables.state_claim(values, names["stage 1"], names["stage 2"], teacher) if names["stage 1"] and names["stage 2"] else []
    return {"worlds": figures.draw_memories(index, shown, truths, samples) if shown else [], "rows": rows}


def build_galleries(
    values: Results,
    index: Sequence[Row],
    present: Mapping[str, list[str]],
    stages: Mapping[str, Mapping[str, str]],
    samples: Path,
    fps: int,
) -> dict[str, dict[str, Any]]:
    """Build each suite's gallery of the cases that `choose_cases` chooses for stage 2, or for stage 1 where that is the last."""
    galleries = {}
    for suite in SUITES:
        students = [names[suite] for names in (stages["stage1"], stages["stage2"]) if suite in names]
        last, before = students[-1] if students else None, students[0] if len(students) > 1 else None
        items, most = list(figures.group_by_item(index, suite)), figures.GALLERY_ROWS[suite]
        cases = dict(choose_cases(values, suite, items, last, before, most))
        galleries[suite] = figures.build_gallery(suite, index, present[suite], samples, fps, cases)
    return galleries


def list_failures(
    rows: Sequence[Row], index: Sequence[Row], galleries: Mapping[str, Mapping[str, Any]], *, searched: bool
) -> dict[str, Any]:
    """Count failures by suite, system and kind, and list them with the place of their video on the page, where it is shown.

    `searched`: whether videos were searched for failures at all.
    """
    shown = {tile["file"]: row["id"] for gallery in galleries.values() for row in gallery["rows"] for tile in row["tiles"]}
    videos = Counter((row["suite"], row["system"]) for row in index)
    counts: dict[tuple[str, str], Counter[str]] = {key: Counter() for key in videos}
    for suite, system, kind, _ in {(row["suite"], row["system"], row["kind"], row["file"]) for row in rows}:
        counts[suite, system][kind] += 1
    placed = [dict(row) | {"place": shown.get(row["file"])} for row in rows]
    placed.sort(key=lambda row: (row["place"] is None, row["system"] == "real"))  # a stable sort: videos of this page first
    table = [
        {"suite": suite, "system": system, "videos": videos[suite, system], "kinds": kinds} for (suite, system), kinds in counts.items()
    ]
    return {"table": table, "searched": searched, "rows": placed[:MOST_FAILURES], "of": len(placed), "kinds": failures.KINDS}


def build_suites(values: Results, present: Mapping[str, list[str]], charts: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each suite's title, systems, tables and charts, for the page."""
    return [
        {"title": title, "systems": present[s], "tables": tables.build_tables(values, s, present[s]), "charts": charts.get(s, [])}
        for s, title in SUITES.items()
    ]


def build_recall(values: Results, order: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tables of the suite without videos, systems in the order of params.yaml."""
    present = {system for suite, system, _ in values.cells if suite == tables.RECALL} | set(values.means.get(tables.RECALL, {}))
    return tables.build_tables(values, tables.RECALL, [*(name for name in order if name in present), *sorted(present - set(order))])


def count_contents(html: str) -> dict[str, float]:
    """Count the videos, film strips and bytes of a page."""
    return {"videos": html.count("data:video/mp4"), "strips": html.count("data:image/png"), "bytes": len(html.encode())}
