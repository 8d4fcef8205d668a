"""VBench-Long: a long video scored in short clips (slow branch) and by the first frames of its clips (fast branch).

Two variants stand side by side and are never mixed. `upstream` is what VBench's code does, faults included; `fixed` does what its
documentation says. Source: Vchitect/VBench at 45e79ec, vbench2_beta_long/utils.py and configs/slow_fast_params.yaml.

What differs: upstream averages over clips, since its grouping by video groups nothing, and so long videos count more; and its
fast branch looks a score up in a table whose keys are quantiles, so a long-range similarity of 0.5 becomes 0.93. `fixed`
averages each video's clips first, and maps the fast branch's score by the means and deviations that VBench ships beside the table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

CLIP_SECONDS = 2  # the length of clips for videos with prompts of one's own
UPSTREAM, FIXED = "vbench-long/upstream@45e79ec", "vbench-long/fixed"


class Moments(NamedTuple):
    """Means and deviations of in-clip and clip-to-clip scores, by which the latter are mapped to the scale of the former."""

    inclip_mean: float
    inclip_deviation: float
    clip2clip_mean: float
    clip2clip_deviation: float


MOMENTS = {  # configs/slow_fast_params.yaml
    "subject_consistency": Moments(0.9206531487463249, 0.06767633012297831, 0.782773956831079, 0.15702951463645903),
    "background_consistency": Moments(0.9461633887475777, 0.02029563684589086, 0.8817304710164493, 0.0888072562561860),
}


class Fusion(NamedTuple):
    """Weights of the slow and the fast branch."""

    inclip: float
    clip2clip: float


IN_CLIP_ONLY, BOTH = Fusion(1.0, 0.0), Fusion(0.5, 0.5)  # without and with `--dev_flag` of VBench's script


def split_into_clips(frames: int, fps: float, seconds: int = CLIP_SECONDS) -> list[range]:
    """Return the frames of each clip of a video; a last clip that would be short begins earlier, so that it is whole.

    A clip has int(fps) * seconds frames; a video with fewer is one clip.
    """
    length = int(fps) * seconds
    if length < 2:
        raise ValueError(f"clips of {seconds} s at {fps:g} fps have {length} frames; they need at least 2")
    if frames < length:
        return [range(frames)]
    clips = [range(first, first + length) for first in range(0, frames - length + 1, length)]
    if clips[-1].stop < frames:
        clips.append(range(frames - length, frames))
    return clips


def map_by_table(score: float, table: Mapping[float, float]) -> float:
    """Map a fast branch's score by a table as VBench looks it up: linear between its keys, constant beyond them."""
    keys = sorted(table)
    place = bisect_left(keys, score)
    if place in (0, len(keys)):
        return table[keys[0] if place == 0 else keys[-1]]
    low, high = keys[place - 1], keys[place]
    return table[low] + (score - low) * (table[high] - table[low]) / (high - low)


def map_by_moments(score: float, moments: Moments) -> float:
    """Map a fast branch's score so that its mean and deviation become those of the slow branch."""
    standard = (score - moments.clip2clip_mean) / moments.clip2clip_deviation
    return standard * moments.inclip_deviation + moments.inclip_mean


def fuse_branches(inclip: float, mapped: float, weights: Fusion) -> float:
    """Fuse both branches of a clip or video. A mapped score of exactly 0 counts as absent, as VBench's code has it."""
    return inclip * weights.inclip + mapped * weights.clip2clip if mapped else inclip


def average_upstream(
    clips: Sequence[Sequence[float]], fast: Sequence[float | None], weights: Fusion, table: Mapping[float, float]
) -> float:
    """Average consistency over videos as upstream does: over all clips of all videos, each fused with its own video's fast branch.

    `clips` has a list of clip scores for every video, `fast` its clip-to-clip score, or None for a video of one clip.
    """
    fused = []
    for scores, score in zip(clips, fast, strict=True):
        mapped = map_by_table(score or 0.0, table) if weights.clip2clip else 0.0
        fused += [fuse_branches(one, mapped, weights) for one in scores]
    return float(np.mean(fused))


def average_fixed(clips: Sequence[Sequence[float]], fast: Sequence[float | None], weights: Fusion, moments: Moments) -> float:
    """Average consistency over videos: a video's clips first, fused with its fast branch where it has one, then the videos."""
    fused = []
    for scores, score in zip(clips, fast, strict=True):
        inclip = float(np.mean(scores))
        fused.append(inclip if score is None else inclip * weights.inclip + map_by_moments(score, moments) * weights.clip2clip)
    return float(np.mean(fused))


def build_quantile_table(
    inclip: Float[np.ndarray, " N"], clip2clip: Float[np.ndarray, " N"], step: float = 0.01
) -> tuple[Float[np.ndarray, " N"], dict[float, float]]:
    """Map clip-to-clip scores to in-clip scores of the same quantile, and make the table that VBench ships.

    The table's keys are quantiles of clip-to-clip scores, not scores; `map_by_table` shows what looking scores up in it does.
    """
    quantiles = rankdata(clip2clip, method="ordinal") / (len(clip2clip) + 1)
    mapped = np.interp(quantiles, np.linspace(0, 1, len(inclip), endpoint=False), np.sort(inclip))
    table = {round(float(key), 2): float(mapped[np.abs(quantiles - key).argmin()]) for key in np.arange(0, 1, step)}
    return mapped, table
