"""Training curves that leave their bounds, named while a stage trains and in the report (docs/training.md, "Trouble")."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CurveRule:
    """Bounds of one curve of metrics.jsonl, as a mean over its newest values, because single steps are noisy."""

    curve: str
    above: float | None  # trouble begins above it; null: no bound
    below: float | None
    steps: int  # values that are averaged; fewer are never trouble
    means: str  # what it usually is, for people

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; use 1 or more")

    def describe(self, mean: float, step: int) -> str | None:
        """Return a sentence if a mean lies outside the bounds, else None."""
        for word, bound, is_outside in (("above", self.above, mean > (self.above or 0)), ("below", self.below, mean < (self.below or 0))):
            if bound is not None and is_outside:
                return f"{self.curve} is {mean:.6g} at step {step} (mean of {self.steps}), {word} {bound:g}: {self.means}"
        return None


class CurveWatch:
    """The newest values of the curves that have rules, and the rules that were broken; each is named once."""

    def __init__(self, rules: Sequence[CurveRule]) -> None:
        self.rules = rules
        self.newest = [deque[float](maxlen=rule.steps) for rule in rules]
        self.troubles: dict[int, str] = {}  # number of the rule -> sentence

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """Take a row of metrics.jsonl, and return a sentence for every rule that it is the first to break."""
        found = []
        for number, (rule, newest) in enumerate(zip(self.rules, self.newest, strict=True)):
            value = row.get(rule.curve)
            if value is None or number in self.troubles:
                continue
            newest.append(value)
            sentence = rule.describe(sum(newest) / len(newest), row["step"]) if len(newest) == rule.steps else None
            if sentence:
                self.troubles[number] = sentence
                found.append(sentence)
        return found


def find_troubles(rows: Iterable[Mapping[str, Any]], rules: Sequence[CurveRule]) -> list[str]:
    """Return a sentence for every rule that the rows of a training break."""
    watch = CurveWatch(rules)
    return [sentence for row in rows for sentence in watch.check(row)]
