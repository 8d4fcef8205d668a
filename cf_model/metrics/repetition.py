"""NoRepeat: whether a video begins again (RIFLEx, arXiv 2502.15894, appendix D; Self-Forcing++, appendix A.7 and Table 8).

RIFLEx finds, near the period that is expected, the frame nearest to frame 0, and compares the sequence from there with the
sequence from frame 0; a video repeats if they are near. It leaves open the scale of the distance, the search range, and the
period of a causal model, so all three are stated here, and the numbers compare with no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn import functional as F

SIDE = 32  # Choice: frames are averaged to 32 x 32, and the distance of two is the root mean square over pixels and colours, in 0..255
SEARCH_FROM = 5.0  # Choice: repetitions are looked for from 5 s, the base model's length, to half the video
THRESHOLD = 4.0  # Choice: about what re-encoding changes; `calibrate_threshold` finds another from real clips
SHARE = 0.05  # of real clips that a calibrated threshold may call repeating

Thumbnails = Float[np.ndarray, "V S S 3"]


def make_thumbnails(video: UInt8[np.ndarray, "V Y X 3"]) -> Thumbnails:
    """Average frames to 32 x 32 pixels, in 0..255."""
    if video.shape[1:3] == (SIDE, SIDE):
        return video.astype(np.float32)
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(frames, SIDE).permute(0, 2, 3, 1).numpy()


def measure_repetition(thumbnails: Thumbnails, fps: float, search_from: float = SEARCH_FROM) -> tuple[float, float] | None:
    """Return (distance, period in seconds) of the nearest return to frame 0, or None where the search range is empty.

    The distance is the mean over frames between the sequence from that return on and the sequence from frame 0.
    """
    first, last = round(search_from * fps), len(thumbnails) // 2
    if first > last or first < 1:
        return None
    rows = thumbnails.reshape(len(thumbnails), -1)
    period = first + int(np.sqrt(((rows[first : last + 1] - rows[0]) ** 2).mean(axis=1)).argmin())
    distances = np.sqrt(((rows[period:] - rows[:-period]) ** 2).mean(axis=1))
    return float(distances.mean()), period / fps


def score_no_repeat(distances: Sequence[float], threshold: float = THRESHOLD) -> float:
    """Return the share of videos, in percent, whose distance is above the threshold."""
    return 100 * float(np.mean(np.asarray(distances) > threshold))


def calibrate_threshold(distances: Sequence[float]) -> float:
    """Return the threshold that calls 5 % of non-repeating real clips repeating, from their distances."""
    return float(np.quantile(np.asarray(distances, float), SHARE))
