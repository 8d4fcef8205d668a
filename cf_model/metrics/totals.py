"""VBench's totals and the aggregates of its competition track. A total needs every one of its dimensions, measured by VBench's networks.

VBench's script counts a missing dimension as a raw 0, which becomes negative after normalisation; here it is refused.
Source: Vchitect/VBench at 45e79ec, scripts/constant.py, scripts/cal_final_score.py, competitions/__init__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Dimension(NamedTuple):
    """A dimension of VBench: range that is mapped to 0..1, and weight among the dimensions of its group."""

    low: float
    high: float
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462, 1.0),
    "background_consistency": Dimension(0.2615, 1.0),
    "temporal_flickering": Dimension(0.6293, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(0.0, 1.0, 0.5),
    "aesthetic_quality": Dimension(0.0, 1.0),
    "imaging_quality": Dimension(0.0, 1.0),
}
SEMANTIC = {
    "object_class": Dimension(0.0, 1.0),
    "multiple_objects": Dimension(0.0, 1.0),
    "human_action": Dimension(0.0, 1.0),
    "color": Dimension(0.0, 1.0),
    "spatial_relationship": Dimension(0.0, 1.0),
    "scene": Dimension(0.0, 0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(0.0, 0.364),
    "overall_consistency": Dimension(0.0, 0.364),
}
COMPETITION = {  # aggregate -> the dimensions that it averages, with their weights
    "text_alignment": {"overall_consistency": 1.0, "clip_score": 1.0},
    "temporal_quality": {"subject_consistency": 1.0, "background_consistency": 1.0, "motion_smoothness": 1.0, "dynamic_degree": 0.5},
    "frame_wise_quality": {"aesthetic_quality": 1.0, "imaging_quality": 1.0},
}
QUALITY_SHARE = 0.8  # of the total; the rest is semantic
HALF_DIGIT = 0.005  # by which a number printed with two decimals may be off


class Totals(NamedTuple):
    """VBench's three columns, in 0..1 for dimensions within their ranges; a value above its dimension's range counts above 1."""

    quality: float
    semantic: float
    total: float


def refuse_missing(scores: Mapping[str, float], needed: Mapping[str, object], name: str) -> None:
    """Raise ValueError where a dimension that an aggregate needs is absent, is no number, or was made by a substitute network."""
    lacking = [one for one in needed if one not in scores or not np.isfinite(scores[one])]
    if not lacking:
        return
    stand_ins = sorted(one for one in scores if one.partition("@")[0] in lacking and "@" in one)
    because = f"; {', '.join(stand_ins)} are of substitute networks and can't take their place" if stand_ins else ""
    raise ValueError(f"{name} needs {len(needed)} dimensions and lacks {', '.join(lacking)}{because}; measure them all, or report none")


def normalise_dimensions(scores: Mapping[str, float], dimensions: Mapping[str, Dimension]) -> float:
    """Return the weighted mean of dimensions, each mapped from its range to 0..1 without clipping."""
    values = [one.weight * (scores[name] - one.low) / (one.high - one.low) for name, one in dimensions.items()]
    return sum(values) / sum(one.weight for one in dimensions.values())


def compute_totals(scores: Mapping[str, float]) -> Totals:
    """Compute quality, semantic and total score from all 16 dimensions, raw and in 0..1; ValueError names those that are missing."""
    refuse_missing(scores, QUALITY | SEMANTIC, "VBench's total")
    quality, semantic = normalise_dimensions(scores, QUALITY), normalise_dimensions(scores, SEMANTIC)
    return Totals(quality, semantic, combine_scores(quality, semantic))


def combine_scores(quality: float, semantic: float) -> float:
    """Return the total of a quality and a semantic score: four parts of the one, one of the other."""
    return QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic


def recompute_printed_total(quality: float, semantic: float, total: float) -> float | None:
    """Return the total that printed columns (two decimals) give where it contradicts the printed total, and None where it does not.

    Every number may be off by half a digit. Context Forcing's Table 2 prints 82.45 for 83.55 and 76.10, which give 82.06.
    """
    computed = combine_scores(quality, semantic)
    return round(computed, 2) if abs(computed - total) > 2 * HALF_DIGIT + 1e-9 else None


def compute_competition(scores: Mapping[str, float], aggregate: str) -> float:
    """Compute an aggregate of VBench's competition track, which Self-Forcing++ reports: a weighted mean of raw dimensions.

    `aggregate` is a key of COMPETITION; the unit is that of the scores. ValueError names dimensions that are missing.
    """
    weights = COMPETITION[aggregate]
    refuse_missing(scores, weights, aggregate)
    return sum(scores[name] * weight for name, weight in weights.items()) / sum(weights.values())
