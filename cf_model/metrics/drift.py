"""Drift of exposure, colour and sharpness over a video, and seams between the chunks that it was generated in.

No paper defines these; they are named in docs/evaluation.md. Frames are uint8 [V, Y, X, 3].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.stats import theilslopes

from cf_model.metrics.windowed import LATENT_FRAMES

Video = UInt8[np.ndarray, "V Y X 3"]
Series = Float[np.ndarray, " V"]
REC709 = np.array([0.2126, 0.7152, 0.0722], np.float32)  # red, green and blue in luma
DARK, BRIGHT = 4, 251  # luma at and beyond which a pixel counts as clipped
REFERENCE = 2.0  # seconds at a video's beginning that the rest is compared with
BIN = 0.5  # seconds that are averaged before a slope is fitted
PIXELS_AT_ONCE = 2**15  # that are measured together: a frame in float takes four times its room, and small frames cost by their number


def measure_frames(video: Video) -> dict[str, Series]:
    """Measure every frame: `luma` and `colour` in 0..255, `sharpness` as the mean luma step between neighbouring pixels, `clipped` in 0..1.

    `colour` is the mean distance of a pixel from grey of its luma.
    """
    rows: dict[str, list[Series]] = {"luma": [np.empty(0)], "colour": [np.empty(0)], "sharpness": [np.empty(0)], "clipped": [np.empty(0)]}
    few = max(1, PIXELS_AT_ONCE // video[:1, ..., 0].size) if len(video) else 1
    for first in range(0, len(video), few):
        picture = video[first : first + few].astype(np.float32)
        luma = picture @ REC709
        steps = [average_frames(np.abs(np.diff(luma, axis=axis))) for axis in (1, 2)]
        rows["luma"].append(average_frames(luma))
        rows["colour"].append(average_frames(np.sqrt(((picture - luma[..., None]) ** 2).sum(axis=-1))))
        rows["sharpness"].append((steps[0] + steps[1]) / 2)
        rows["clipped"].append(average_frames((luma <= DARK) | (luma >= BRIGHT)))
    return {name: np.concatenate(values, dtype=np.float64) for name, values in rows.items()}


def average_frames(values: np.ndarray) -> Series:
    """Average [V, Y, X] over each frame."""
    return values.reshape(len(values), -1).mean(axis=1)


def measure_drift(series: Series, fps: float) -> dict[str, float]:
    """Measure how a value leaves its own beginning, the first 2 s (of a video below 8 s, its first quarter).

    `slope` is the Theil-Sen slope per minute and `late` the change from the beginning to an end of equal length; both are
    parts of the beginning's mean. Raises ValueError for fewer than 4 frames.
    """
    if len(series) < 4:
        raise ValueError(f"drift compares a video's end with its beginning, and it has {len(series)} frames; give at least 4")
    size = max(1, min(round(REFERENCE * fps), len(series) // 4))
    start = max(abs(float(series[:size].mean())), 1e-6)
    relative = series / start
    step = max(1, min(round(BIN * fps), len(series) // 4))
    bins = relative[: len(series) // step * step].reshape(-1, step).mean(axis=1)
    slope = theilslopes(bins, np.arange(len(bins)) * step / fps / 60).slope
    return {"slope": float(slope), "late": float(relative[-size:].mean() - relative[:size].mean())}


def score_drift(frames: Mapping[str, Series], fps: float) -> dict[str, float]:
    """Return slope and late change of luma, colour and sharpness, and the mean share of clipped pixels."""
    out = {f"{name}_{kind}": value for name in ("luma", "colour", "sharpness") for kind, value in measure_drift(frames[name], fps).items()}
    return out | {"clipped": float(frames["clipped"].mean())}


def list_chunk_borders(frames: int, latents: int) -> Int[np.ndarray, " B"]:
    """Return the first frames of every chunk but the first, for chunks of `latents` latent frames of Wan's codec."""
    size = LATENT_FRAMES * latents
    return np.arange(size - LATENT_FRAMES + 1, frames, size)


def score_seams(differences: Float[np.ndarray, " N"], *, latents: int, window: int) -> dict[str, float]:
    """Score seams from the differences of neighbouring frames (entry k: frames k and k+1), for chunks of `latents` latent frames.

    `seam_ratio` is the mean difference at chunk borders over that elsewhere: 1 without seams. `seam_autocorrelation` is the
    correlation of the differences with themselves, one `window` of latent frames later: 0 without a rhythm of that length.
    Either is absent where the video is too short for it, or does not move at all.
    """
    borders = list_chunk_borders(len(differences) + 1, latents) - 1
    elsewhere = np.delete(differences, borders)
    out = {}
    if len(borders) and len(elsewhere) and elsewhere.mean() > 0:
        out["seam_ratio"] = float(differences[borders].mean() / elsewhere.mean())
    lag = LATENT_FRAMES * window
    if len(differences) >= 2 * lag:
        before, after = differences[:-lag], differences[lag:]
        if before.std() > 0 and after.std() > 0:
            out["seam_autocorrelation"] = float(np.corrcoef(before, after)[0, 1])
    return out
