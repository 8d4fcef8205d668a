"""The report's words, tables and comparisons, and the page around them.

No file is read but the page's template. The same input gives the same bytes: no date, no random id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from cf_model.evaluate.figures import draw_differences
from cf_model.evaluate.statistics import RATIOS, Difference, Interval, bootstrap, bootstrap_ratio, paired, paired_ratio, without_interval

RECALL = "recall"  # the suite of measures that need no video: one-step errors and interventions
GUARD_SHARE = 0.9  # of stage 1's value of a guard; if stage 2 has less, its win may be hollow
ARROWS = {"up": "↑", "down": "↓", "real": "≈", "": ""}


class Metric(NamedTuple):
    """A metric's words for people. `better`: up, down, real (as near to the real clips as possible) or empty."""

    group: str
    better: str
    means: str
    title: str = ""


OBEYS, LOOKS, MOVES, RECALLS = "Does it show what was asked?", "Does it look right?", "Does it move?", "Does it remember?"
STAYS = "Does it stay the same?"
WINDOWED = "Context Forcing, Table 1: mean cosine with the first frame (CLIP-T: with the prompt) around that second, times 100"
NUMBERED = {  # names that end in a number of seconds
    **{begin: Metric(STAYS, "", WINDOWED) for begin in ("dinov2_", "clip_f_", "clip_t_")},
}
DESCRIPTIONS = {
    "compass_coherence": Metric(OBEYS, "up", "how clearly one heading can be read off the strip at the bottom; 1 is a clean strip"),
    "sky_accuracy": Metric(OBEYS, "up", "share of frames whose sky is nearest to the caption's"),
    "sprite_recall": Metric(OBEYS, "up", "share of frames with a patch of the caption's colour in the sky"),
    "sprite_precision": Metric(OBEYS, "up", "of all that stands out of the sky, the share in the caption's colour"),
    "shape_accuracy": Metric(OBEYS, "up", "share of frames whose sprite has the caption's shape; chance is 1/3"),
    "sharpness": Metric(LOOKS, "real", "mean difference of neighbouring pixels; below the real clips is blur, above is noise"),
    "sky_error": Metric(LOOKS, "down", "distance of the sky's colours from the caption's sky, 0..255"),
    "jitter": Metric(LOOKS, "down", "how unevenly the camera turns from frame to frame, units a second"),
    "speed": Metric(MOVES, "real", "of the camera, units a second; captions ask for slow or fast"),
    "motion": Metric(MOVES, "real", "mean difference of neighbouring frames, 0..255; near zero is a frozen video"),
    "stutter": Metric(MOVES, "real", "change between two latents' frames over change inside a latent's frames; 1 moves evenly"),
    "failures": Metric(LOOKS, "down", "resets, jumps, stalls and exposure events in a video, as the failure log lists them"),
    "headings_covered": Metric(MOVES, "real", "share of the circle that the camera sees"),
    "heading_perplexity": Metric(MOVES, "real", "how many of twelve headings all videos together use evenly"),
    "memory_ratio": Metric(RECALLS, "down", "mean same heading over mean other heading, see there; 0 is perfect memory, 1 is none"),
    "same_heading": Metric(RECALLS, "down", "colour distance from the last visit, over evaluate.absence ago; sink headings left out"),
    "other_heading": Metric(RECALLS, "real", "colour distance between different headings of a video; a dull world makes it small"),
    "map_error": Metric(RECALLS, "down", "after a real prefix: distance from the true landmarks, last seen over evaluate.gap seconds ago"),
    "map_error_recent": Metric(RECALLS, "down", "the same on content seen more recently"),
    "map_error_absent": Metric(RECALLS, "down", "the same, last seen over evaluate.absence ago and not in what the sink shows"),
    "recall_error_75": Metric(RECALLS, "down", "one-step error at noise level 0.75 where only the slow memory knows a real clip's hills"),
    "recall_error_90": Metric(RECALLS, "down", "the same at noise level 0.9"),
    "slow_gain_75": Metric(RECALLS, "up", "how much higher that error is without the slow memory, at 0.75"),
    "slow_gain_90": Metric(RECALLS, "up", "the same at noise level 0.9"),
    "identity_2s": Metric(RECALLS, "up", "share of hills away for 2 to 4 s that come back in their colour; guessing gives about 1/6"),
    "identity_4s": Metric(RECALLS, "up", "the same, away for 4 to 8 s"),
    "identity_8s": Metric(RECALLS, "up", "the same, away for 8 to 16 s"),
    "revisit_skill": Metric(RECALLS, "up", "1 - error at a heading seen before over that at others, exposure fitted; 0 is no memory"),
    "place_error": Metric(RECALLS, "down", "seconds of camera between where the landmarks say and where the compass says"),
    "match_quality": Metric(RECALLS, "up", "correlation of landmarks with those of the first visit, where they fit best"),
    "heading_error": Metric(MOVES, "down", "seconds of camera between a continuation's heading and its world's; turning points are free"),
    "context_effect_0s": Metric(RECALLS, "up", "share that follows a fact of its own context, still in view, above chance; at most 0.5"),
    "context_effect_4s": Metric(RECALLS, "up", "the same, the fact was last in view 4 to 8 s before"),
    "context_effect_8s": Metric(RECALLS, "up", "the same, 8 to 16 s before"),
    "effective_context": Metric(RECALLS, "up", "longest of these lags, in seconds, whose effect is surely above chance"),
    "hills_readable": Metric(LOOKS, "up", "share of visits to the middle of a hill that show a colour of the palette"),
    "luma_drift": Metric(LOOKS, "real", "size of the brightness's slope a minute, as a part of the first 2 s"),
    "colour_drift": Metric(LOOKS, "real", "the same of colourfulness"),
    "sharpness_drift": Metric(LOOKS, "real", "the same of sharpness"),
    "motion_late": Metric(MOVES, "real", "motion of the last quarter over that of the first; 0 is a video that stops"),
    "motion_spike": Metric(MOVES, "real", "the three largest changes between frames over their median; a jump makes it large"),
    "seam_ratio": Metric(MOVES, "real", "change at the borders of chunks over that elsewhere; 1 has no seams"),
    "repeat_distance": Metric(MOVES, "real", "distance from the nearest return to the first frame, 0..255; 0 is a loop"),
    "diversity": Metric(RECALLS, "real", "landmark distance between videos; a fall means that the worlds become alike"),
    "subject_consistency": Metric(
        STAYS, "", "VBench: mean cosine of each frame with the one before and with the first; a frozen video has 1"
    ),
    "background_consistency": Metric(STAYS, "", "the same by another network"),
    "videos": Metric("How many?", "", "videos measured"),
}
GUARDS = ("diversity", "heading_perplexity", "headings_covered", "motion")
COMPARED = (
    *(("prompts", metric) for metric in ("memory_ratio", "same_heading", "other_heading")),
    *(("continuations", metric) for metric in ("map_error_absent", "map_error", "map_error_recent")),
    *(("prompts", metric) for metric in (*GUARDS, "sharpness", "sky_error", "sprite_recall")),
)


def describe_metric(metric: str) -> Metric:
    """Return a metric's words, with its name as the title; a new metric gets a group of its own. A network after an @ is named.

    NAME_videos is the number of videos that have NAME, where not all have it.
    """
    if metric.endswith("_videos"):
        of = metric.removesuffix("_videos").replace("_", " ")
        return Metric(DESCRIPTIONS["videos"].group, "", f"videos in which {of} could be measured", metric.replace("_", " "))
    name, _, network = metric.partition("@")
    numbered = next((NUMBERED[begin] for begin in NUMBERED if re.fullmatch(rf"{begin}[\d.]+s", name)), None)
    words = numbered or DESCRIPTIONS.get(name, Metric("Other", "", "no description is known to this page"))
    means = f"{words.means}; made with {network} in the place of the metric's own network" if network else words.means
    return words._replace(title=metric.replace("_", " "), means=means)


@dataclass(frozen=True)
class Results:
    """Values of the stage evaluate. `cells`: (suite, system, metric) -> (item, seed) -> value; `means` also has metrics of all a
    system's videos together: suite -> system -> metric -> value.
    """

    cells: Mapping[tuple[str, str, str], Mapping[tuple[str, int], float]]
    means: Mapping[str, Mapping[str, Mapping[str, float]]]
    resamples: int
    seed: int
    protocols: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)  # suite and metric -> how it was measured

    def interval(self, suite: str, system: str, metric: str) -> Interval | None:
        """Return a system's mean with its bootstrap interval, a mean without interval, or None if the metric is absent."""
        if metric in RATIOS:
            tops, bottoms = (self.cells.get((suite, system, name), {}) for name in RATIOS[metric])
            if ratio := bootstrap_ratio(tops, bottoms, resamples=self.resamples, seed=self.seed):
                return ratio
        if values := self.cells.get((suite, system, metric)):
            prompts: dict[str, list[float]] = {}
            for (item, _), value in values.items():
                prompts.setdefault(item, []).append(value)
            return bootstrap(prompts, resamples=self.resamples, seed=self.seed)
        mean = self.means.get(suite, {}).get(system, {}).get(metric)
        return None if mean is None else without_interval(mean)

    def difference(self, suite: str, first: str, second: str, metric: str) -> Difference | None:
        """Return second minus first: paired if both have videos in common, else of the means; None if either is absent."""
        return pair_results((self, suite, first), (self, suite, second), metric)

    def metrics(self, suite: str) -> list[str]:
        """Return the names of a suite's metrics, in the order of DESCRIPTIONS."""
        names = {metric for s, _, metric in self.cells if s == suite}
        names |= {metric for values in self.means.get(suite, {}).values() for metric in values}
        return sorted(names, key=lambda name: (list(DESCRIPTIONS).index(name) if name in DESCRIPTIONS else len(DESCRIPTIONS), name))


def pair_results(first: tuple[Results, str, str], second: tuple[Results, str, str], metric: str) -> Difference | None:
    """Return second minus first, each a run's results, a suite and a system of it: paired if both have videos in common, else of means.

    A ratio of means is paired as one. None if either side lacks the metric.
    """
    rules: dict[str, Any] = {"resamples": first[0].resamples, "seed": first[0].seed}
    if metric in RATIOS:
        tables = [[one.cells.get((suite, system, name), {}) for name in RATIOS[metric]] for one, suite, system in (first, second)]
        if ratios := paired_ratio((tables[0][0], tables[0][1]), (tables[1][0], tables[1][1]), **rules):
            return ratios
    a, b = (one.cells.get((suite, system, metric), {}) for one, suite, system in (first, second))
    if both := paired(a, b, **rules):
        return both
    x, y = (one.interval(suite, system, metric) for one, suite, system in (first, second))
    return Difference(x.mean, y.mean, without_interval(y.mean - x.mean), float("nan")) if x and y else None


def format_number(value: float | int | None) -> str:
    """Format a number with about three digits; a missing value is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}".replace(",", " ").replace("-", "−")
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:.{digits}f}" if size >= 0.01 or value == 0 else f"{value:.2g}"
    return text.replace("-", "−")


def interval_ends(interval: Interval) -> tuple[float, float]:
    """Return the interval's ends, or the mean twice if there is no interval."""
    return interval[1:] if interval.has_ends else (interval.mean, interval.mean)


def build_tables(results: Results, suite: str, systems: Sequence[str]) -> list[dict[str, Any]]:
    """Build a table for each group of metrics; a cell has the mean, its interval and their places on the column's scale (per cent)."""
    groups: dict[str, dict[str, Any]] = {}
    for metric in results.metrics(suite):
        intervals = {name: results.interval(suite, name, metric) for name in systems}
        present = [i for i in intervals.values() if i]
        if not present:
            continue
        low, high = min(interval_ends(i)[0] for i in present), max(interval_ends(i)[1] for i in present)
        about = describe_metric(metric)
        table = groups.setdefault(about.group, {"title": about.group, "columns": [], "rows": {name: [] for name in systems}})
        table["columns"].append({"word": about, "arrow": ARROWS[about.better]})
        for name, i in intervals.items():
            places = [50.0 if high == low else 100 * (value - low) / (high - low) for value in (i.mean, *interval_ends(i))] if i else None
            bar = places and {"interval": i, "dot": places[0], "left": places[1], "width": places[2] - places[1]}
            table["rows"][name].append(bar)
    return list(groups.values())


def state_verdict(change: Interval, better: str) -> str:
    """Say what a paired difference shows: better, worse, no clear difference, or why it shows nothing."""
    if not change.has_ends:
        return "no interval"
    if change.low <= 0 <= change.high:
        return "no clear difference"
    if better not in ("up", "down"):
        return "higher" if change.mean > 0 else "lower"
    return "better" if (change.mean > 0) == (better == "up") else "worse"


def compare_stages(results: Results, first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, Any]:
    """Compare stage 2 with stage 1 (system names by suite), with the guards that keep a win from being hollow."""
    rows, fell, ratio = [], [], "absent"
    for suite, metric in COMPARED:
        if suite not in first or suite not in second:
            continue
        difference = results.difference(suite, first[suite], second[suite], metric)
        if difference is None:
            continue
        about = describe_metric(metric)
        says = state_verdict(difference.change, about.better)
        if metric == "memory_ratio":
            ratio = says
        if metric in GUARDS and difference.second < GUARD_SHARE * difference.first:
            fell.append(f"{about.title} ({format_number(difference.first)} to {format_number(difference.second)})")
        real = results.interval(suite, "real", metric)
        counts = count_wins(difference.each, about.better)
        row = {"suite": suite, "word": about, "arrow": ARROWS[about.better], "found": difference, "says": says, "real": real}
        rows.append(row | {"counts": counts, "svg": draw_differences(difference.each) if counts else ""})
    missing = [describe_metric(m).title for m in GUARDS if not any(row["word"] == describe_metric(m) for row in rows)]
    return {"rows": rows, "fell": fell, "ratio": ratio, "missing": missing}


def count_wins(each: Sequence[float], better: str) -> str:
    """Say in how many prompts the second is better, the same and worse; higher and lower where neither is better. Empty without prompts."""
    above, below = sum(change > 0 for change in each), sum(change < 0 for change in each)
    words = {"up": ("better", "worse"), "down": ("worse", "better")}.get(better, ("higher", "lower"))
    counts = dict(zip(words, (above, below), strict=True))
    first, last = sorted(words, key=lambda word: word in ("worse", "lower"))
    return f"{counts[first]} {first}, {len(each) - above - below} same, {counts[last]} {last}" if each else ""


def compare_memories(results: Results, systems: Sequence[str]) -> list[dict[str, Any]]:
    """Compare map errors of a model with several memories; each but the first also with the first, video by video."""
    rows: list[dict[str, Any]] = []
    for name in systems:
        errors = [results.interval("continuations", name, metric) for metric in ("map_error", "map_error_recent")]
        against = results.difference("continuations", systems[0], name, "map_error") if name != systems[0] else None
        rows.append({"system": name, "errors": errors, "against": against})
    return rows


CLAIM = (  # suite, metric: what the claim is judged by, and what must not fall beside it
    ("continuations", "map_error_absent"),
    *(("recall", metric) for metric in ("recall_error_75", "recall_error_90", "slow_gain_75", "slow_gain_90")),
    *(("recall", f"context_effect_{lag}s") for lag in (4, 8)),
    ("prompts", "memory_ratio"),
    *(("prompts", metric) for metric in ("speed", "other_heading", "diversity", "sprite_recall", "headings_covered")),
)


def state_claim(results: Results, before: str, after: str, teacher: str | None) -> list[dict[str, Any]]:
    """Return a row for each metric of CLAIM: both students, their paired difference, the teacher where it has videos, and real clips."""
    rows = []
    for suite, metric in CLAIM:
        found, about = results.difference(suite, before, after, metric), describe_metric(metric)
        if found:
            others = [results.interval(suite, name, metric) if name else None for name in (teacher, "real")]
            says = state_verdict(found.change, about.better)
            rows.append({"suite": suite, "word": about, "arrow": ARROWS[about.better], "found": found, "others": others, "says": says})
    return rows


def check_goals(results: Results, prompts: Mapping[str, str], memories: Mapping[str, str]) -> list[dict[str, Any]]:
    """Check what the tiny profile set out to learn. `prompts`: weights -> system; `memories`: teacher's memory -> system."""

    def mean(suite: str, system: str | None, metric: str) -> float | None:
        interval = results.interval(suite, system, metric) if system else None
        return interval.mean if interval else None

    def row(goal: str, values: Sequence[float | None], reached: str, test: Any) -> dict[str, Any]:
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            return {"goal": goal, "reached": "absent", "held": None}
        return {"goal": goal, "reached": reached.format(*map(format_number, present)), "held": bool(test(*present))}

    rows = []
    for metric, least in (("compass_coherence", 0.9), ("sky_accuracy", 0.95), ("sprite_recall", 0.8)):
        values = [mean("prompts", system, metric) for system in (prompts.get("base"), "real")]
        title = describe_metric(metric).title
        rows.append(row(f"base: {title} above {least}", values, "{0}, real {1}", lambda v, _, least=least: v > least))
    recall = [mean("prompts", prompts.get(weights), "sprite_recall") for weights in ("causal_init", "stage1")]
    goal = "stage 1: sprite recall at least 0.25 above the causal start's, or at least 0.95"
    rows.append(row(goal, recall, "{1}, from {0}", lambda before, after: after >= min(before + 0.25, 0.95)))
    sharp = [mean("prompts", prompts.get("stage1"), "sharpness"), mean("prompts", "real", "sharpness")]
    rows.append(row("stage 1: sharpness within 20 % of real", sharp, "{0}, real {1}", lambda v, real: abs(v - real) <= 0.2 * real))
    # only videos in which both systems meet a landmark again that was long out of sight
    both = {"slow-fast", "fast only"} <= memories.keys()
    pair = results.difference("continuations", memories["fast only"], memories["slow-fast"], "map_error") if both else None
    errors = [pair.second, pair.first] if pair else [None, None]
    goal = "teacher: map error with slow-fast memory at least 20 % below fast only"
    return [*rows, row(goal, errors, "{0}, fast only {1}", lambda slow, fast: slow <= 0.8 * fast)]


def render_page(page: Mapping[str, Any], template: Path = Path(__file__).parent / "report.html.j2") -> str:
    """Render a page; every value in it is escaped, except the figures that this package draws."""
    loader = jinja2.FileSystemLoader(template.parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = format_number
    return environment.get_template(template.name).render(page)
