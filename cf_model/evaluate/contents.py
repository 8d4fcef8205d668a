"""All that the report's template shows, from what the stages wrote. Only videos are read here; tasks/report.py reads the other files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cf_model.codec.interface import TIME

from . import figures, page
from . import report as tables
from .cells import SUITES
from .figures import Row
from .planes import draw_consistency, draw_planes
from .provenance import list_provenance, list_warnings
from .report import Results
from .rule_histograms import describe_rules, select_pictured, sort_by_fate
from .twins import Recompute, build_twins

Systems = Mapping[str, page.System]
STUDENTS = ("stage2", "stage1", "causal_init", "base")  # the first that has videos is the one whose prompts are guessed


@dataclass(frozen=True)
class Measured:
    """What was measured of the videos: values, curves, failures in time, and how it was measured."""

    values: Results
    curves: page.Curves = field(default_factory=dict)
    failures: Sequence[Row] = ()  # suite, system, file, kind, second and others
    unscored: Sequence[str] = ()  # why videos could not be scored
    protocols: Collection[str] = ()
    weights: Collection[str] = ()  # of networks that score
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the videos from a prompt, by system


@dataclass(frozen=True)
class Trained:
    """What the stages before generate wrote: the manifest, the list of clips, and each stage's rows and metrics."""

    manifest: Sequence[Row]
    clips: Sequence[Row]
    training: Mapping[str, Sequence[Row]]
    metrics: Mapping[str, Mapping[str, Any]]
    hashes: Mapping[str, str]  # path -> DVC's md5


@dataclass(frozen=True)
class FilterView:
    """Rules of the filter with their histograms, clips by fate, and pictures of clips by id."""

    rules: Sequence[Mapping[str, Any]]
    fates: Mapping[str, Sequence[Row]]
    pictures: dict[str, str] = field(default_factory=dict)

    def list_wanted(self, manifest: Sequence[Row]) -> list[Row]:
        """List the rows of the manifest whose clips need a picture."""
        wanted = select_pictured(self.rules, self.fates)
        return [row for row in manifest if row["id"] in wanted]


def view_filter(manifest: Sequence[Row], bounds: Mapping[str, tuple[str, str, float]]) -> FilterView:
    """Return the filter's rules and clips, still without pictures."""
    return FilterView(describe_rules(manifest, bounds), sort_by_fate(manifest))


def build_contents(
    params: Any,
    recipes: Mapping[str, Systems],
    measured: Measured,
    trained: Trained,
    filtered: FilterView,
    samples: Path,
    index: Sequence[Row],
    recompute: Recompute,
) -> dict[str, Any]:
    """Build what the template shows.

    `params`: those of params.yaml; `recipes`: each suite's systems as trained; `index`: of the folder `samples`; `recompute`: VBench's
    total from its printed parts, where that is not the printed total.
    """
    values, fps = measured.values, params.video.fps
    present = {suite: page.systems_of(suite, systems, index, values) for suite, systems in recipes.items()}
    colours = page.choose_colours(present["prompts"] + present["continuations"])
    roles = {suite: page.by_weights(systems, present[suite]) for suite, systems in recipes.items()}
    stages = {weights: {suite: role[weights] for suite, role in roles.items() if weights in role} for weights in ("stage1", "stage2")}
    student = next((roles["prompts"][weights] for weights in STUDENTS if weights in roles["prompts"]), None)
    galleries = page.build_galleries(values, index, present, stages, samples, fps)
    shown = [row["key"] for row in galleries["prompts"]["rows"]]
    planes = draw_planes(values, present, colours)
    charts = page.draw_curves(measured.curves, colours, page.list_marks(params))
    contexts = {name: system.memory.size * TIME / fps for name, system in recipes["prompts"].items() if system.memory}
    continued = list(recipes["continuations"])
    of_student = values.means.get("prompts", {}).get(student or "", {})
    return {
        "params": params,
        "warnings": list_warnings(params, index, values, measured.unscored),
        "provenance": list_provenance(params, index, measured.protocols, trained.hashes, measured.weights),
        "troubles": page.list_troubles(trained.training, params.watch),
        "facts": page.list_facts(params, index, trained.manifest, [row for gallery in galleries.values() for row in gallery["rows"]]),
        "colours": colours,
        "recipes": {suite: {name: page.describe_system(system) for name, system in systems.items()} for suite, systems in recipes.items()},
        "student": student,
        "guesses": figures.build_guesses(index, student, samples, shown=shown, choices=params.evaluate.choices, seed=params.seed),
        "machine": {key: value for key, value in of_student.items() if "guess" in key},
        "galleries": galleries,
        "suites": page.build_suites(values, present, charts),
        "recall": page.build_recall(values, continued),
        "planes": planes,
        "twins": build_twins(values, present["prompts"], contexts, measured.seconds, recompute),
        "consistency": draw_consistency(values, present, colours),
        "every": figures.STRIP_SECONDS,
        "suite_titles": SUITES,
        "failures": page.list_failures(
            measured.failures, index, galleries, searched=any(metric == "failures" for _, _, metric in values.cells)
        ),
        "training": page.draw_training(trained.training),
        "pipeline": page.list_stages(trained.metrics),
        "filter": page.summarise_filter(trained.manifest, trained.clips) | vars(filtered),
    } | compare_systems(values, index, recipes["continuations"], present, roles, stages, trained.clips, samples)


def compare_systems(
    values: Results,
    index: Sequence[Row],
    continued: Systems,
    present: Mapping[str, list[str]],
    roles: Mapping[str, Mapping[str, str]],
    stages: Mapping[str, Mapping[str, str]],
    clips: Sequence[Row],
    samples: Path,
) -> dict[str, Any]:
    """Return the parts of the page that compare systems: the claim, the goals, stage 2 with stage 1, and the teacher's memories."""
    teachers = [name for name in present["continuations"] if name in continued and continued[name].weights == "teacher"]
    kinds = {page.name_memory(continued[name]): name for name in reversed(teachers)}
    return {
        "claim": page.build_claim(values, index, stages, kinds.get("slow-fast"), clips, samples),
        "goals": tables.check_goals(values, roles["prompts"], kinds),
        "compared": tables.compare_stages(values, stages["stage1"], stages["stage2"]),
        "pairs": {suite: (name, stages["stage2"][suite]) for suite, name in stages["stage1"].items() if suite in stages["stage2"]},
        "teachers": tables.compare_memories(values, sorted(teachers, key=lambda name: name != kinds.get("slow-fast"))),
    }
