"""What the committed cells say about each contrast of the plan: effect, interval, p over training seeds, and a verdict.

The unit of replication is the training seed: each seed's difference is a mean over the same reported clips, and p is the exact sign-flip
test over seeds, corrected within the declared family by Holm. Intervals draw seeds and clips anew, both at once, because the clips are
the same for all seeds. A claim is one-sided; gains are positive where the first arm is the better one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy import stats

from cf_model.evaluate.statistics import bootstrap_crossed, correct_by_holm, sign_flip
from study.cells import CommittedCell
from study.nodes import compute_cell_key
from study.plan import Contrast, Gate, Metric, Plan

Verdict = Literal["holds", "does not hold", "not informative"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one contrast. `effect` is the first arm less the second, in the metric's unit."""

    contrast: Contrast
    seeds: tuple[int, ...]
    excluded: int  # seeds left out by a rule of the plan
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_family: float | None = None  # after Holm's correction; of an exploratory claim p itself
    verdict: Verdict = "not informative"
    why: str = "n = 0"


@dataclass(frozen=True)
class GateState:
    """Whether a gate is met in a world: by the mean over seeds of map error as a part of the chance level; None: not measured."""

    gate: Gate
    world: str
    value: float | None
    seeds: int
    met: bool | None


@dataclass(frozen=True)
class Evidence:
    """All that the page shows, from the plan and the cells."""

    plan: Plan
    cells: Mapping[tuple[str, str, int], CommittedCell]  # world, arm, seed; counted ones of this plan
    foreign: int = 0  # committed cells of other parameters than the plan's: left out
    excluded: Mapping[tuple[str, str, int], str] = field(default_factory=dict)  # cells that a rule leaves out, and the rule

    def values(self, world: str, arm: str, seed: int, metric: Metric) -> dict[str, float]:
        """Return a metric's values by clip; under an empty name the value of all videos together; empty where there is none."""
        cell = self.cells.get((world, arm, seed))
        row = cell.find_metric(metric.suite, metric.name) if cell else None
        return {} if row is None else (row["clips"] or {"": row["mean"]})

    def mean(self, world: str, arm: str, seed: int, metric: Metric) -> float | None:
        """Return the mean of a metric over the clips of one cell."""
        values = self.values(world, arm, seed, metric)
        return float(np.mean([*values.values()])) if values else None

    def seeds(self, world: str, arms: Sequence[str], metric: Metric) -> list[int]:
        """List the seeds for which all of these arms have the metric and none is excluded."""
        own = [
            {seed for w, a, seed in self.cells if (w, a) == (world, arm) and self.values(w, a, seed, metric)}
            - {seed for w, a, seed in self.excluded if (w, a) == (world, arm)}
            for arm in arms
        ]
        return sorted(set.intersection(*own))


def gather_evidence(plan: Plan, cells: Iterable[CommittedCell]) -> Evidence:
    """Take the counted cells whose parameters are the plan's, and find those that a rule of the plan excludes."""
    known, kept, foreign = set(plan.cells), {}, 0
    for one in cells:
        if one.cell not in known or one.about["key"] != compute_cell_key(plan, one.cell):
            foreign += 1
        elif one.cell.counted:
            kept[one.cell.world, one.cell.arm, one.cell.seed] = one
    excluded = {}
    for key, one in kept.items():
        for rule in plan.exclude:
            metric = plan.metrics[rule.metric]
            row = one.find_metric(metric.suite, metric.name)
            if row is not None and row["mean"] < rule.below:
                excluded[key] = f"{rule.metric} {row['mean']:.3g}, below {rule.below:g}: {rule.says}"
    return Evidence(plan, kept, foreign, excluded)


def check_gates(evidence: Evidence, world: str) -> list[GateState]:
    """Return the state of each gate in a world. Chance is the distance between headings of the real clips."""
    plan = evidence.plan
    primary = plan.metrics["map_error"]
    states = []
    for gate in plan.gate:
        shares = []
        for (w, arm, _), cell in evidence.cells.items():
            error = cell.find_metric(primary.suite, primary.name, gate.system)
            chance = cell.find_metric(primary.suite, plan.metrics["contrast"].name, "real")
            if (w, arm) == (world, gate.arm) and error and chance:
                shares.append(error["mean"] / chance["mean"])
        value = float(np.mean(shares)) if shares else None
        low, high = gate.at_least or -np.inf, gate.at_most or np.inf
        states.append(GateState(gate, world, value, len(shares), None if value is None else bool(low <= value <= high)))
    return states


def judge_contrasts(evidence: Evidence) -> list[Finding]:
    """Return a finding for every contrast of the plan, corrected within its family; those without cells count in the family too."""
    findings = [measure_contrast(evidence, contrast) for contrast in evidence.plan.contrasts]
    for family in ("primary", "secondary"):
        members = [number for number, one in enumerate(findings) if one.contrast.family == family]
        adjusted = correct_by_holm([1.0 if (p := findings[number].p) is None else p for number in members])
        for number, p in zip(members, adjusted, strict=True):
            findings[number] = replace(findings[number], p_family=None if findings[number].p is None else p)
    findings = [replace(one, p_family=one.p) if one.contrast.family == "exploratory" else one for one in findings]
    gates = {world: check_gates(evidence, world) for world in evidence.plan.worlds}
    return [_judge(evidence.plan, one, gates) for one in findings]


def _judge(plan: Plan, found: Finding, gates: Mapping[str, Sequence[GateState]]) -> Finding:
    """Give a finding its verdict. That a claim was not shown is `does not hold` only where a difference that matters is excluded."""
    contrast, n = found.contrast, len(found.seeds)
    if not n or found.p_family is None:
        return found
    smallest = smallest_p(contrast, n)
    if smallest > plan.level:
        return replace(found, why=f"n = {n}, whose smallest p is {smallest:.2g}")
    for world in filter(None, (contrast.world, contrast.other_world)):
        for state in gates[world]:
            if not state.met:
                measured = "not measured" if state.value is None else f"{state.value:.2g} of chance"
                return replace(found, why=f"the gate is not met in {world}: {state.gate.says}, {measured}")
    if found.p_family <= plan.level:
        return replace(found, verdict="holds", why=f"n = {n}")
    metric = plan.metrics[contrast.metric]
    assert found.low is not None and found.high is not None
    most = found.high if metric.better == "up" else -found.low  # the largest gain that the interval allows
    if most < metric.margin:
        return replace(found, verdict="does not hold", why=f"n = {n}; a gain of {metric.margin:g} is excluded")
    return replace(found, why=f"n = {n}; the interval holds both no gain and one that matters, {metric.margin:g}")


def smallest_p(contrast: Contrast, seeds: int) -> float:
    """Return the smallest p that so many seeds can give: all signs equal, or all seeds in the order that a trend predicts."""
    if contrast.test != "trend":
        return 2.0**-seeds
    return float(stats.page_trend_test(np.tile(np.arange(len(contrast.arms)), (seeds, 1)), method="exact").pvalue) if seeds > 1 else 1.0


def measure_contrast(evidence: Evidence, contrast: Contrast) -> Finding:
    """Measure a contrast: effect and interval, and p before correction."""
    plan, metric = evidence.plan, evidence.plan.metrics[contrast.metric]
    seeds = evidence.seeds(contrast.world, contrast.arms, metric)
    if contrast.other_world:
        seeds = [seed for seed in seeds if seed in evidence.seeds(contrast.other_world, contrast.arms, metric)]
    if contrast.beside:
        seeds = [seed for seed in seeds if seed in evidence.seeds(contrast.world, contrast.arms, plan.metrics[contrast.beside])]
    left_out = {seed for world, arm, seed in evidence.excluded if world == contrast.world and arm in contrast.arms}
    if not seeds:
        return Finding(contrast, (), len(left_out))
    first, second = (contrast.arms[-1], contrast.arms[0]) if contrast.test == "trend" else contrast.arms
    table = tabulate_differences(evidence, contrast.world, first, second, metric, seeds)
    if contrast.other_world:
        other = tabulate_differences(evidence, contrast.other_world, first, second, metric, seeds)
        table = np.nanmean(table, axis=1, keepdims=True) - np.nanmean(other, axis=1, keepdims=True)
    sign = 1.0 if metric.better == "up" else -1.0
    gains = sign * np.nanmean(table, axis=1)
    low, high = bootstrap_crossed(table, plan.resamples)
    p = compare_trend(evidence, contrast, seeds) if contrast.test == "trend" else compare_signs(gains)
    if contrast.beside:  # intersection and union: both must be shown, so the larger p counts
        beside = plan.metrics[contrast.beside]
        other = tabulate_differences(evidence, contrast.world, first, second, beside, seeds)
        p = max(p, compare_signs((1.0 if beside.better == "up" else -1.0) * np.nanmean(other, axis=1) + beside.margin))
    return Finding(contrast, tuple(seeds), len(left_out), float(np.nanmean(table, axis=1).mean()), low, high, p)


def tabulate_differences(evidence: Evidence, world: str, first: str, second: str, metric: Metric, seeds: Sequence[int]) -> np.ndarray:
    """Return first less second, [seeds, clips]; nan where a clip lacks the metric in either. Seeds without a common clip raise KeyError."""
    pairs = [tuple(evidence.values(world, arm, seed, metric) for arm in (first, second)) for seed in seeds]
    clips = sorted({clip for one, other in pairs for clip in one.keys() & other.keys()})
    if not clips:
        raise KeyError(f"{first} and {second} in {world} have no clip in common; measure them again")
    return np.array([[one[clip] - other[clip] if clip in one and clip in other else np.nan for clip in clips] for one, other in pairs])


def compare_signs(gains: np.ndarray) -> float:
    """Return the exact one-sided p of a mean gain over seeds."""
    return sign_flip(gains.tolist(), resamples=2**20, seed=0, one_sided=True)


def compare_trend(evidence: Evidence, contrast: Contrast, seeds: Sequence[int]) -> float:
    """Return the one-sided p of Page's test: within each seed the metric gets better from arm to arm."""
    metric = evidence.plan.metrics[contrast.metric]
    sign = 1.0 if metric.better == "up" else -1.0
    if len(seeds) < 2:
        return 1.0
    rows = [[sign * (evidence.mean(contrast.world, arm, seed, metric) or 0.0) for arm in contrast.arms] for seed in seeds]
    return float(stats.page_trend_test(np.array(rows)).pvalue)
