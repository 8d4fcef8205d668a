"""Which videos the report shows: the worst, those that a stage changed most, then the first. A rule decides, no hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .report import Results, describe_metric, format_number

# Choice: a video is judged by the first of these that was measured; the last ones need no known world.
RANKED_BY = {
    "prompts": ("same_heading", "sprite_recall", "stutter", "sharpness"),
    "continuations": ("map_error_absent", "map_error", "stutter", "sharpness"),
}
SHARES = (0.375, 0.375)  # of a gallery's rows: the worst, and the most changed


class Case(NamedTuple):
    """An item of a gallery, and why it is shown."""

    item: str
    why: str


def choose_cases(results: Results, suite: str, items: Sequence[str], student: str | None, before: str | None, most: int) -> list[Case]:
    """Choose at most `most` of the items: the student's worst videos, those most changed from `before` to it, then the first."""
    cases: dict[str, str] = {}
    metric = next((name for name in RANKED_BY[suite] if student and results.cells.get((suite, student, name))), None)
    if student and metric:
        word = describe_metric(metric).title
        scores = average_seeds(results, suite, student, metric, items)
        faults = measure_faults(scores, results, suite, metric)
        for item in sorted(faults, key=lambda item: (-faults[item], item))[: round(SHARES[0] * most)]:
            cases[item] = f"among the worst of {student}: {word} {format_number(scores[item])}"
        earlier = average_seeds(results, suite, before, metric, items) if before else {}
        changes = {item: abs(scores[item] - earlier[item]) for item in scores if item in earlier and item not in cases}
        for item in sorted(changes, key=lambda item: (-changes[item], item))[: round(SHARES[1] * most)]:
            change = f"{format_number(earlier[item])} to {format_number(scores[item])}"
            cases[item] = f"among the most changed from {before} to {student}: {word} {change}"
    for item in items[: most + len(cases)]:
        cases.setdefault(item, "among the first of samples/index.jsonl")
    return [Case(item, why) for item, why in cases.items()][:most]


def average_seeds(results: Results, suite: str, system: str, metric: str, items: Sequence[str]) -> dict[str, float]:
    """Return a system's value of a metric for each of the items that have one, as a mean over seeds."""
    values: dict[str, list[float]] = {}
    for (item, _), value in results.cells.get((suite, system, metric), {}).items():
        values.setdefault(item, []).append(value)
    return {item: sum(values[item]) / len(values[item]) for item in items if item in values}


def measure_faults(scores: Mapping[str, float], results: Results, suite: str, metric: str) -> dict[str, float]:
    """Return how bad each score is: larger is worse. A metric without a better side is compared with the real clips' mean."""
    better = describe_metric(metric).better
    if better in ("up", "down"):
        return {item: value if better == "down" else -value for item, value in scores.items()}
    real = results.interval(suite, "real", metric)
    middle = real.mean if real else sum(scores.values()) / len(scores)
    return {item: abs(value - middle) for item, value in scores.items()}
