"""VBench's formulas for single dimensions, without its networks: what a dimension does with features, flows and scores of frames.

Source: Vchitect/VBench at 45e79ec (Apache-2.0), restated; the numbers of its own code are in tests/golden/eval. Videos are uint8
[V, Y, X, 3], features float [V, C]. Scores are in 0..1, larger is better; none is clipped, because VBench clips none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

Video = UInt8[np.ndarray, "V Y X 3"]
Features = Float[np.ndarray, "V C"]
Interpolator = Callable[[Float[Tensor, "1 3 Y X"], Float[Tensor, "1 3 Y X"]], Float[Tensor, "1 3 Y X"]]
MULTIPLE = 16  # frames are padded to multiples of this many pixels before they are interpolated
FASTEST_SHARE = 0.05  # of a flow field's pixels, those that decide whether it moves
MOVING = 6 / 256  # shortest side of the frame that those must move by, from a sampled frame to the next
SAMPLING_RATE = 8  # frames a second that are sampled to look for motion


def normalise_rows(features: Float[np.ndarray, "*N C"]) -> Float[np.ndarray, "*N C"]:
    """Scale each row to length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(lengths, 1e-12)


def measure_similarities(features: Features) -> tuple[Float[np.ndarray, " V-1"], Float[np.ndarray, " V-1"]]:
    """Return the cosines of every frame but the first with the frame before it, and with the first frame."""
    rows = normalise_rows(features.astype(np.float64))
    return (rows[1:] * rows[:-1]).sum(axis=1), rows[1:] @ rows[0]


def score_consistency(features: Features) -> float:
    """Score subject (DINO) or background (CLIP) consistency of a video: mean over frames of both cosines, negative ones as 0.

    Raises ValueError for fewer than two frames, where VBench divides by zero.
    """
    if len(features) < 2:
        raise ValueError(f"consistency compares frames, and there are {len(features)}; give a video of at least 2")
    before, first = measure_similarities(features)
    return float((np.maximum(before, 0) + np.maximum(first, 0)).mean() / 2)


def measure_differences(video: Video) -> Float[np.ndarray, " V-1"]:
    """Return the mean absolute difference of neighbouring frames, in 0..255."""
    return np.array([np.abs(a.astype(np.int16) - b).mean() for a, b in pairwise(video)])


def score_flicker(differences: Float[np.ndarray, " N"]) -> float:
    """Score temporal flickering: 1 - mean difference of neighbouring frames / 255."""
    return float(1 - np.mean(differences) / 255)


def measure_interpolation_error(before: UInt8[np.ndarray, "Y X 3"], frame: UInt8[np.ndarray, "Y X 3"],
                        after: UInt8[np.ndarray, "Y X 3"], interpolate: Interpolator) -> float:  # fmt: skip
    """Return how far a frame is from what `interpolate` makes of its neighbours: mean absolute difference, in 0..255.

    The neighbours are padded by repeating their edges to multiples of 16 pixels, and the result is cut back and rounded down.
    """
    height, width = frame.shape[:2]
    below, right = -height % MULTIPLE, -width % MULTIPLE
    edges = (right // 2, right - right // 2, below // 2, below - below // 2)
    pair = [F.pad(torch.tensor(one).permute(2, 0, 1)[None] / 255.0, edges, mode="replicate") for one in (before, after)]
    with torch.no_grad():
        made = interpolate(*pair)[0, :, edges[2] : edges[2] + height, edges[0] : edges[0] + width]
    picture = (made * 255.0).permute(1, 2, 0).cpu().numpy().clip(0, 255).astype(np.uint8)
    return float(np.abs(picture.astype(np.int16) - frame).mean())


def measure_interpolation(video: Video, interpolate: Interpolator) -> Float[np.ndarray, " V-2"]:
    """Return `measure_interpolation_error` of every frame but the first and the last."""
    return np.array([measure_interpolation_error(video[k], video[k + 1], video[k + 2], interpolate) for k in range(len(video) - 2)])


def score_smoothness(errors: Float[np.ndarray, " N"]) -> float:
    """Score motion smoothness from the interpolation errors of frames 1 to V-2: VBench drops and remakes every second frame."""
    if len(errors) < 1:
        raise ValueError("motion smoothness remakes a frame from its neighbours; give a video of at least 3 frames")
    return float(1 - np.mean(errors[::2]) / 255)


def score_flow(flow: Float[np.ndarray, "2 Y X"]) -> float:
    """Return the mean length of the largest 5 % of a flow field's vectors, in pixels; nan where 5 % is less than one vector."""
    lengths = np.sort(np.hypot(*flow.astype(np.float32)).ravel())[::-1]
    fastest = lengths[: int(lengths.size * FASTEST_SHARE)]
    return float(fastest.mean()) if len(fastest) else float("nan")


def choose_interval(fps: float) -> int:
    """Return the distance, in frames, of the frames that dynamic degree keeps: about 8 a second."""
    return max(1, round(fps / SAMPLING_RATE))


def decide_motion(flow_scores: Sequence[float], *, height: int, width: int, sampled: int) -> bool:
    """Decide whether a video moves, from `score_flow` of neighbouring sampled frames; dynamic degree is the share of such videos.

    A quarter of the `sampled` frames, rounded, must be fast. For 2 sampled frames that is 0 of them, so such a video always moves.
    """
    fast = sum(score > MOVING * min(height, width) for score in flow_scores)
    return len(flow_scores) > 0 and bool(fast >= round(sampled / 4))


def score_aesthetics(features: Features, weight: Float[np.ndarray, " C"], bias: float) -> float:
    """Score aesthetic quality: LAION's linear head on normalised CLIP ViT-L/14 features, mean over frames, / 10."""
    return float((normalise_rows(features.astype(np.float64)) @ weight.astype(np.float64) + bias).mean() / 10)


def score_imaging(ratings: Float[np.ndarray, " V"]) -> float:
    """Score imaging quality: the mean over frames of what a quality network (MUSIQ) says in 0..100, / 100."""
    return float(np.mean(ratings) / 100)


def score_text(features: Features, text: Float[np.ndarray, " C"]) -> float:
    """Score the match of frames (CLIP score: 8 middle frames) or of one video vector (overall consistency) with a text: mean cosine."""
    return float((normalise_rows(features.astype(np.float64)) @ normalise_rows(text.astype(np.float64))).mean())


def share_moving(moves: Sequence[bool] | Bool[np.ndarray, " N"]) -> float:
    """Return dynamic degree: the share of videos that move."""
    return float(np.mean(moves))
