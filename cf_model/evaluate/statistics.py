"""Intervals for means over prompts, and for paired differences of two systems or of two recipes over training seeds.

The unit that is resampled is the prompt, never the video: seeds of one prompt are one draw (a cluster bootstrap).
That covers the choice of prompts and noise. It says nothing about another training run, which needs training seeds: `bootstrap_crossed`
and a one-sided `sign_flip` over the seeds' means. Tests that were declared together are corrected together, by `correct_by_holm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RATIOS = {"memory_ratio": ("same_heading", "other_heading")}  # metrics that are a ratio of two metrics' means over the same videos


class Interval(NamedTuple):
    """Mean over videos with its percentile interval; low and high are nan where a single prompt gives no interval."""

    mean: float
    low: float
    high: float

    @property
    def has_ends(self) -> bool:
        """Whether the mean has an interval."""
        return not np.isnan(self.low)


def without_interval(mean: float) -> Interval:
    """Return a mean that has no interval."""
    return Interval(mean, float("nan"), float("nan"))


class Difference(NamedTuple):
    """Difference of two systems, second minus first, over the (prompt, seed) pairs of both; `p` is two-sided, by sign flips, or nan.

    `effect` is the mean difference in standard deviations of the prompts' differences, where they have one.
    """

    first: float
    second: float
    change: Interval
    p: float
    prompts: int = 0
    effect: Interval | None = None
    each: tuple[float, ...] = ()  # each prompt's mean difference, in ascending order


def bootstrap(values: Mapping[str, Sequence[float]] | Sequence[float], *, resamples: int, seed: int) -> Interval:
    """Return the mean over all videos and its interval, given each prompt's values by seed; in a plain list each value is a prompt.

    The interval is a percentile bootstrap over prompts: `resamples` draws with replacement, each weighted by its videos.
    """
    # Sorted, so that the draws do not depend on the order in which prompts were read.
    groups = [values[prompt] for prompt in sorted(values)] if isinstance(values, Mapping) else [[value] for value in values]
    if not groups or not all(groups):
        raise ValueError("bootstrap got a prompt without values; every prompt needs at least one, leave empty ones out")
    totals = np.array([sum(group) for group in groups], float)
    counts = np.array([len(group) for group in groups], float)
    mean = float(totals.sum() / counts.sum())
    if len(groups) < 2:
        return without_interval(mean)
    drawn = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def sign_flip(differences: Sequence[float], *, resamples: int, seed: int, one_sided: bool = False) -> float:
    """Return the p of a mean difference, if each unit's difference (a prompt's, a training seed's) could as well have had the other sign.

    Two-sided, or for a claim that the mean is above 0. Exact when all sign patterns fit into `resamples`, otherwise drawn; then p is
    never below 1 / (resamples + 1).
    """
    values = np.asarray(differences, float)
    if len(values) == 0:
        raise ValueError("sign_flip got no differences; it needs at least one pair")
    fold = (lambda means: means) if one_sided else np.abs
    # A hair below the observed mean, because rounding must not let the observed pattern miss its own bound.
    bound = fold(values.mean()) - abs(values.mean()) * 1e-12
    if 2 ** min(len(values), 62) <= resamples:
        patterns = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean(fold((1 - 2 * patterns) @ values / len(values)) >= bound))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(values)))
    hits = int(np.sum(fold(signs @ values / len(values)) >= bound))
    return (hits + 1) / (resamples + 1)


def correct_by_holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method, in the order given. They are the declared family."""
    order, out, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[number]))
        out[number] = largest
    return out


def measure_effect(differences: Sequence[float], *, resamples: int, seed: int) -> Interval | None:
    """Return the mean of paired differences in their own standard deviations (Cohen's d of pairs), with its bootstrap interval.

    None for fewer than two units, and where all differences are equal. Draws of equal units, which have no deviation, are left out.
    """
    values = np.asarray(differences, float)
    least = 1e-9 * np.abs(values).max(initial=0.0)  # rounding is no deviation
    if len(values) < 2 or np.ptp(values) <= least:
        return None
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))]
    drawn = drawn[np.ptp(drawn, axis=1) > least]
    low, high = np.quantile(drawn.mean(1) / drawn.std(1, ddof=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean() / values.std(ddof=1)), float(low), float(high))


def bootstrap_crossed(table: np.ndarray, resamples: int) -> tuple[float, float]:
    """Return the percentile interval of the mean over seeds of their means over clips; seeds and clips are both drawn anew.

    `table` is [seeds, clips], with nan where a clip has no value.
    """
    rng = np.random.default_rng(0)
    seeds, clips = table.shape
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # how often each is drawn, [R, S]
    drawn_clips = rng.multinomial(clips, np.full(clips, 1 / clips), size=resamples)  # [R, W]
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (drawn_clips @ np.nan_to_num(table).T) / (drawn_clips @ known.T.astype(float))  # [R, S]
    weights = drawn_seeds * np.isfinite(means)
    values = (weights * np.nan_to_num(means)).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    low, high = np.quantile(values[weights.sum(axis=1) > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(
    first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float], *, resamples: int, seed: int
) -> Difference | None:
    """Compare two systems, second minus first, over the (prompt, seed) pairs of both; None when they share no pair."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    by_prompt: dict[str, list[float]] = {}
    for key in shared:
        by_prompt.setdefault(key[0], []).append(second[key] - first[key])
    change = bootstrap(by_prompt, resamples=resamples, seed=seed)
    means = [float(np.mean(group)) for group in by_prompt.values()]
    p = sign_flip(means, resamples=resamples, seed=seed) if len(means) > 1 else float("nan")
    return Difference(
        first=float(np.mean([first[key] for key in shared])),
        second=float(np.mean([second[key] for key in shared])),
        change=change,
        p=p,
        prompts=len(means),
        effect=measure_effect(means, resamples=resamples, seed=seed),
        each=tuple(sorted(means)),
    )


def bootstrap_ratio(
    tops: Mapping[tuple[str, int], float], bottoms: Mapping[tuple[str, int], float], *, resamples: int, seed: int
) -> Interval | None:
    """Return the ratio of two means over the videos that have both values, and its interval over prompts; None without such videos.

    A ratio of means, because the mean of ratios is ruled by videos whose bottom is small.
    """
    found = paired_ratio((tops, bottoms), (tops, bottoms), resamples=resamples, seed=seed, minus=False)
    return found and found.change


def paired_ratio(
    first: tuple[Mapping[tuple[str, int], float], Mapping[tuple[str, int], float]],
    second: tuple[Mapping[tuple[str, int], float], Mapping[tuple[str, int], float]],
    *,
    resamples: int,
    seed: int,
    minus: bool = True,
) -> Difference | None:
    """Compare a ratio of means of two systems, second minus first, over the videos that have all four values; None without any.

    `first` and `second` are tops and bottoms by (prompt, seed). Without `minus` the change is the second's ratio alone.
    """
    tables = (*first, *second)
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    if not shared:
        return None
    prompts = sorted({prompt for prompt, _ in shared})
    # Sums over the videos of each prompt: [4, prompts].
    sums = np.array([[sum(table[key] for key in shared if key[0] == prompt) for prompt in prompts] for table in tables])

    def ratios(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return both systems' ratios for each draw of prompts, [draws, prompts] to [draws]."""
        totals = sums[:, drawn].sum(axis=-1)
        return totals[0] / totals[1], totals[2] / totals[3]

    before, after = (float(value[0]) for value in ratios(np.arange(len(prompts))[None]))
    change = after - before if minus else after
    if len(prompts) < 2:
        return Difference(before, after, without_interval(change), float("nan"), len(prompts))
    first_drawn, second_drawn = ratios(np.random.default_rng(seed).integers(len(prompts), size=(resamples, len(prompts))))
    low, high = np.quantile(second_drawn - first_drawn if minus else second_drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(before, after, Interval(change, float(low), float(high)), float("nan"), len(prompts))
