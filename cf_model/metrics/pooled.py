"""Consistency by pooled pixels: the formulas of VBench and of Context Forcing's Table 1 where no network's weights are at hand.

Every name says so behind an @ (subject_consistency@pooled-8x8), because the numbers can't be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from cf_model.metrics.encoders import PooledEncoder
from cf_model.metrics.vbench import Video, score_consistency
from cf_model.metrics.windowed import score_anchored


def score_pooled(video: Video, fps: float) -> Iterator[tuple[str, str, float]]:
    """Yield protocol, metric and value: VBench's consistency of the whole video, and DINOv2's windows as far as the video fills them."""
    if len(video) < 2:
        return
    encoder = PooledEncoder()
    features = encoder.encode(video)
    yield "vbench", f"subject_consistency{encoder.suffix}", score_consistency(features)
    for second, value in score_anchored(features, fps).items():
        yield "windows", f"dinov2_{second}s{encoder.suffix}", value
