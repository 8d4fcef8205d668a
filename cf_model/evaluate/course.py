"""How a video changes from its beginning to its end: drift, stagnation, jumps, seams between chunks, repetition.

Drift and repetition mean what they mean for any video (cf_model/metrics); frames here are small and many, so some of them are measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8

from cf_model.codec.interface import TIME
from cf_model.metrics.drift import measure_drift, measure_frames
from cf_model.metrics.repetition import make_thumbnails, measure_repetition

Video = UInt8[np.ndarray, "V Y X 3"]
Motion = Float[np.ndarray, " N"]  # change from each frame to the next
DRIFT_RATE, REPEAT_RATE = 2, 4  # frames a second that are measured
SPIKES = 3  # largest changes that are averaged


def score_course(video: Video, motion: Motion, fps: int, *, prefix: int, borders: Int[np.ndarray, " B"] | None) -> dict[str, float]:
    """Score a video's course; what it is too short for is absent.

    luma_drift, colour_drift and sharpness_drift are sizes of the Theil-Sen slope a minute, as parts of the first 2 s, a real prefix
    included. motion_late is the motion of the last quarter over that of the first. motion_spike is the mean of the three largest
    changes between frames over their median, after the prefix. seam_ratio is the change at `borders`, the first frames of chunks, over
    that elsewhere after the prefix. repeat_distance is that of the nearest return to frame 0 (cf_model/metrics/repetition.py).
    """
    out = dict(score_motion(motion, prefix)) | dict(score_drift_sizes(video, fps))
    if borders is not None and len(borders):
        at = np.zeros(len(motion), bool)
        at[borders - 1] = True
        new = np.arange(len(motion)) >= prefix - 1
        if (new & ~at).any() and motion[new & ~at].mean() > 0:
            out["seam_ratio"] = float(motion[at].mean() / motion[new & ~at].mean())
    step = max(1, round(fps / REPEAT_RATE))
    if found := measure_repetition(make_thumbnails(np.ascontiguousarray(video[::step])), fps / step):
        out["repeat_distance"] = found[0]
    return out


def score_motion(motion: Motion, prefix: int) -> Iterator[tuple[str, float]]:
    """Yield stutter, motion_late and motion_spike, unless the video is too short or what others are compared with stands still.

    stutter is what `measure_stutter` (stutter.py) measures of a video's frames, from the motion that is known already.
    """
    number = np.arange(1, len(motion) + 1)  # of the later frame
    at = number % TIME == 1
    border, inside = (float(motion[(number > prefix) & some].mean() if (some & (number > prefix)).any() else 0) for some in (at, ~at))
    if border or inside:
        yield "stutter", border / max(inside, 1e-3)
    quarter, new = len(motion) // 4, motion[max(0, prefix - 1) :]
    if quarter and motion[:quarter].mean() > 0:
        yield "motion_late", float(motion[-quarter:].mean() / motion[:quarter].mean())
    if len(new) >= SPIKES and np.median(new) > 0:
        yield "motion_spike", float(np.sort(new)[-SPIKES:].mean() / np.median(new))


def score_drift_sizes(video: Video, fps: int) -> Iterator[tuple[str, float]]:
    """Yield the sizes of the slopes, because a mean over videos of which some brighten and others darken would say nothing."""
    step = max(1, round(fps / DRIFT_RATE))
    frames = measure_frames(video[::step])
    if len(frames["luma"]) >= 4:
        for name in ("luma", "colour", "sharpness"):
            yield f"{name}_drift", abs(measure_drift(frames[name], fps / step)["slope"])


def list_borders(frames: int, *, first: int, latents: int, time: int) -> Int[np.ndarray, " B"]:
    """Return the first frames of the chunks of `latents` latents of `time` frames that follow one another from frame `first` on.

    A video without a prefix begins with a latent of a single frame, so its second chunk begins early.
    """
    return np.arange(first or time * (latents - 1) + 1, frames, time * latents)
