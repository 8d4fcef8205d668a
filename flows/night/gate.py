"""Whether a candidate may take the promoted student's place: rules of params.yaml's section `nightly`, and every number in gate.json.

Both were judged on the same prompts and seeds. What was not measured, or is not a number, is never a reason to promote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

# metrics of tasks/evaluate.py that compare a video with what its clip was rendered from
NEED_TRUTH = (
    *("compass_coherence", "diversity", "heading_perplexity", "headings_covered", "jitter", "map_error", "map_error_recent"),
    *("memory_ratio", "other_heading", "same_heading", "shape_accuracy", "sky_accuracy", "sky_error", "speed", "sprite_precision"),
    "sprite_recall",
)
Shown = Sequence[tuple[str, int]]  # prompt and seed of each video


class Rule(BaseModel):
    """As tasks/params/nightly.py has it, and says what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    better: Literal["higher", "lower"]
    margin: FiniteFloat
    bound: FiniteFloat | None


class Finding(BaseModel):
    """One rule, its numbers, and what it says."""

    model_config = ConfigDict(frozen=True)

    metric: str
    better: Literal["higher", "lower"]
    margin: float
    bound: float | None
    candidate: float | None
    promoted: float | None
    gain: float | None  # of the candidate over the promoted; below 0 it is worse
    passed: bool
    said: str


class Verdict(BaseModel):
    model_config = ConfigDict(frozen=True)

    promote: bool
    why: str  # one sentence; of a refusal, the first metric that refused
    candidate: str  # md5
    promoted: str | None
    version: str | None  # of the promoted
    prompts: list[str]
    seeds: list[int]
    findings: list[Finding]
    numbers: dict[str, dict[str, Any]]  # candidate, promoted -> all that evaluate measured

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        partial.replace(path)


class Judged(BaseModel):
    """A model, and what was measured on its videos."""

    model_config = ConfigDict(frozen=True)

    md5: str
    numbers: dict[str, Any]
    shown: list[tuple[str, int]]
    version: str | None = None


def judge(candidate: Judged, promoted: Judged | None, rules: Sequence[Rule]) -> Verdict:
    """Without a promoted student only what is absolute can be asked: that all was measured, and the bounds."""
    findings = [find(rule, candidate.numbers, promoted.numbers if promoted else None) for rule in rules]
    refused = [finding.said for finding in findings if not finding.passed]
    if not rules:
        refused = ["there is no rule; nightly.rules in params.yaml states them"]
    if not candidate.shown:
        refused.insert(0, "the candidate has no videos")
    elif promoted and list(promoted.shown) != list(candidate.shown):
        refused.insert(0, "candidate and promoted student were not shown the same prompts and seeds, so their numbers can't be compared")
    better = ", ".join(finding.said for finding in findings)
    return Verdict(
        promote=not refused,
        why="; ".join(refused) if refused else better,
        candidate=candidate.md5,
        promoted=promoted.md5 if promoted else None,
        version=promoted.version if promoted else None,
        prompts=list(dict.fromkeys(prompt for prompt, _ in candidate.shown)),
        seeds=sorted({seed for _, seed in candidate.shown}),
        findings=findings,
        numbers={"candidate": candidate.numbers} | ({"promoted": promoted.numbers} if promoted else {}),
    )


def find(rule: Rule, candidate: Mapping[str, Any], promoted: Mapping[str, Any] | None) -> Finding:
    mine = number(candidate, rule.metric)
    theirs = number(promoted, rule.metric) if promoted is not None else None
    sign = 1 if rule.better == "higher" else -1
    gain = None if mine is None or theirs is None else sign * (mine - theirs)
    passed, said = _said(rule, mine, theirs, gain, sign, promoted is not None)
    values = {"candidate": mine, "promoted": theirs, "gain": gain, "passed": passed, "said": f"{rule.metric} {said}"}
    return Finding(**rule.model_dump(), **values)


def _said(rule: Rule, mine: float | None, theirs: float | None, gain: float | None, sign: int, compare: bool) -> tuple[bool, str]:
    if mine is None:
        return False, "was not measured for the candidate"
    if compare and theirs is None:
        return False, f"is {mine:g}, but was not measured for the promoted student"
    if rule.bound is not None and sign * (mine - rule.bound) < 0:
        return False, f"is {mine:g}, {'below' if sign > 0 else 'above'} its bound {rule.bound:g}"
    if gain is None:
        return True, f"is {mine:g}"
    needed = f"{rule.margin:g} better" if rule.margin > 0 else f"no more than {-rule.margin:g} worse" if rule.margin < 0 else "no worse"
    if gain < rule.margin:
        return False, f"is {mine:g}, and must be {needed} than the promoted student's {theirs:g}"
    return True, f"{mine:g} after {theirs:g}"


def number(tree: Mapping[str, Any] | None, path: str) -> float | None:
    """By dotted path; a system's name may hold dots. None for what isn't there or is no finite number."""
    node: Any = tree
    rest = path
    while rest:
        if not isinstance(node, Mapping):
            return None
        name = next((name for name in sorted(map(str, node), key=len, reverse=True) if rest == name or rest.startswith(f"{name}.")), None)
        if name is None:
            return None
        node, rest = node[name], rest[len(name) + 1 :]
    if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
        return None
    return float(node)
