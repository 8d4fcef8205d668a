"""Whether a candidate may take the promoted student's place: rules of params.yaml's section `nightly`, and every number in gate.json.

Both students are measured on the same prompts and seeds. What was not measured, or is not a number, is never a reason to promote.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat

from tasks.files.json_lines import write_json
from tasks.files.trees import list_nodes
from tasks.files.words import count_things

# metrics of the stage evaluate (cf_model/evaluate/scores.py) that compare a video with what its clip was rendered from
NEED_TRUTH = (
    *("compass_coherence", "diversity", "heading_error", "heading_perplexity", "headings_covered", "hills_readable", "identity_2s"),
    *("identity_4s", "identity_8s", "jitter", "map_error", "map_error_absent", "map_error_recent", "match_quality", "memory_ratio"),
    *("other_heading", "place_error", "revisit_skill", "same_heading", "shape_accuracy", "sky_accuracy", "sky_error", "speed"),
    *("sprite_precision", "sprite_recall"),
)


class Rule(BaseModel, extra="forbid", frozen=True):
    """One entry of nightly.rules; tasks/params/nightly.py explains each value."""

    metric: str
    better: Literal["higher", "lower"]
    margin: FiniteFloat
    bound: FiniteFloat | None


class Finding(Rule):
    """One rule, both students' numbers, and whether the rule lets the candidate pass. Written to gate.json."""

    candidate: float | None
    promoted: float | None
    gain: float | None  # of the candidate over the promoted student; below 0 the candidate is worse
    low: float | None  # the gain's 95 % interval, paired by prompt and seed; None where there are too few prompts for one
    high: float | None
    passed: bool
    said: str  # one sentence


class Verdict(BaseModel, frozen=True):
    """What the gate decided, and all it decided by. Written to gate.json."""

    promote: bool
    why: str  # the sentences of the rules that refuse, or of all rules
    candidate: str  # md5
    promoted: str | None  # md5
    version: str | None  # of the promoted student
    prompts: list[str]
    seeds: list[int]
    findings: list[Finding]
    numbers: dict[str, dict[str, Any]]  # candidate, promoted -> all that evaluate measured

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False)


class Measured(BaseModel, frozen=True):
    """A student, and what evaluate measured on its videos."""

    md5: str
    numbers: dict[str, Any]
    videos: list[tuple[str, int]]  # prompt and seed of each
    version: str | None = None


def decide_promotion(
    candidate: Measured, promoted: Measured | None, rules: Sequence[Rule], *, troubles: int = 0, pairs: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Apply all rules. Without a promoted student only what is absolute is asked: that all was measured, and the bounds.

    `troubles` counts the curves of the night's training that left their bounds (params.yaml's section watch): one is enough to refuse.
    `pairs` are the rows of `cf compare PROMOTED CANDIDATE --out FILE.json`, whose intervals are said beside the means that decide.
    """
    changes = {f"{row['suite']}.{row['system']}.{row['metric']}": row for row in pairs}
    theirs = promoted.numbers if promoted else None
    findings = [check_rule(rule, candidate.numbers, theirs, changes.get(rule.metric)) for rule in rules]
    reasons = [finding.said for finding in findings if not finding.passed]
    if not rules:
        reasons = ["there is no rule; nightly.rules in params.yaml states them"]
    if troubles:
        curves = count_things(troubles, "training curve")
        reasons.insert(0, f"{curves} left the bounds of params.yaml's section watch; the night's report says which")
    if not candidate.videos:
        reasons.insert(0, "the candidate has no videos")
    elif promoted and promoted.videos != candidate.videos:
        reasons.insert(0, "candidate and promoted student were not shown the same prompts and seeds, so their numbers can't be compared")
    return Verdict(
        promote=not reasons,
        why="; ".join(reasons) or ", ".join(finding.said for finding in findings),
        candidate=candidate.md5,
        promoted=promoted.md5 if promoted else None,
        version=promoted.version if promoted else None,
        prompts=list(dict.fromkeys(prompt for prompt, _ in candidate.videos)),
        seeds=sorted({seed for _, seed in candidate.videos}),
        findings=findings,
        numbers={"candidate": candidate.numbers} | ({"promoted": promoted.numbers} if promoted else {}),
    )


def check_rule(
    rule: Rule, candidate: Mapping[str, Any], promoted: Mapping[str, Any] | None, pair: Mapping[str, Any] | None = None
) -> Finding:
    """Compare one metric of both students' numbers by one rule. `pair` has the interval of candidate minus promoted student."""
    mine, theirs = find_number(candidate, rule.metric), find_number(promoted or {}, rule.metric)
    sign = 1 if rule.better == "higher" else -1
    gain = None if mine is None or theirs is None else sign * (mine - theirs)
    needed = f"{rule.margin:g} better" if rule.margin > 0 else f"no more than {-rule.margin:g} worse" if rule.margin < 0 else "no worse"
    passed = False
    if mine is None:
        sentence = "was not measured for the candidate"
    elif promoted is not None and theirs is None:
        sentence = f"is {mine:g}, but was not measured for the promoted student"
    elif rule.bound is not None and sign * (mine - rule.bound) < 0:
        sentence = f"is {mine:g}, {'below' if rule.better == 'higher' else 'above'} its bound {rule.bound:g}"
    elif gain is not None and gain < rule.margin:
        sentence = f"is {mine:g}, and must be {needed} than the promoted student's {theirs:g}"
    else:
        passed, sentence = True, f"is {mine:g}" if theirs is None else f"{mine:g} after {theirs:g}"
    low, high = None, None
    if pair and gain is not None and pair["low"] is not None:
        low, high = sorted((sign * pair["low"], sign * pair["high"]))
        sentence += f" (paired over {pair['prompts']} prompts: {sign * pair['difference']:+.3g}, 95 % {low:+.3g} to {high:+.3g})"
    values = {"candidate": mine, "promoted": theirs, "gain": gain, "low": low, "high": high}
    values |= {"passed": passed, "said": f"{rule.metric} {sentence}"}
    return Finding(**rule.model_dump(), **values)


def find_number(tree: Mapping[str, Any], path: str) -> float | None:
    """Return the finite number at a dotted path, or None. A name in the tree may hold dots itself."""
    value: Any = dict(list_nodes(tree)).get(path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
