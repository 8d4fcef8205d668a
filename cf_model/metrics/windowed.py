"""Windowed consistency of long videos: DINOv2, CLIP-F and CLIP-T at 10, 20, … seconds (Context Forcing, sec. 4 and Table 1).

S(t) is the mean, over the frames within half a second of t, of the cosine of their features with those of frame 0 (DINOv2,
CLIP-F) or of the prompt (CLIP-T), times 100. A window that the video does not fill is not scored: 80 chunks end at 59.75 s and
would leave 5 of 17 frames in the window at 60 s; 81 chunks are 969 frames at 16 fps and end at exactly 60.5 s.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from cf_model.metrics.vbench import Features, normalise_rows

SECONDS = (10, 20, 30, 40, 50, 60)
HALF = 0.5  # seconds to each side of a window's middle. Choice: both ends belong to it, and negative cosines count as they are.
LATENT_FRAMES = 4  # frames of video in a latent frame of Wan's codec, but for the first latent, which is one frame


def count_frames(chunks: int, latents: int = 3) -> int:
    """Return the frames of a video of `chunks` chunks of `latents` latent frames."""
    return LATENT_FRAMES * (chunks * latents - 1) + 1


def select_window(frames: int, fps: float, second: float, half: float = HALF) -> Int[np.ndarray, " W"] | None:
    """Return the indices of the frames within `half` seconds of a moment, or None where the video ends or begins within the window."""
    first, last = np.ceil((second - half) * fps - 1e-6), np.floor((second + half) * fps + 1e-6)
    return np.arange(int(first), int(last) + 1) if first >= 0 and first <= last < frames else None


def list_window_frames(frames: int, fps: float) -> Int[np.ndarray, " W"]:
    """Return the indices of all frames that windowed scores read, frame 0 among them."""
    windows = [window for second in SECONDS if (window := select_window(frames, fps, second)) is not None]
    return np.unique(np.concatenate([np.zeros(1, int), *windows]))


def score_windows(similarities: Float[np.ndarray, " V"], fps: float) -> dict[int, float]:
    """Average frames' similarities, times 100, in every full window: {second: score}; empty for a video below 10.5 s."""
    windows = {second: select_window(len(similarities), fps, second) for second in SECONDS}
    return {second: 100 * float(similarities[window].mean()) for second, window in windows.items() if window is not None}


def score_anchored(features: Features, fps: float) -> dict[int, float]:
    """Score DINOv2's or CLIP's image features of every frame against frame 0."""
    rows = normalise_rows(features.astype(np.float64))
    return score_windows(rows @ rows[0], fps)


def score_prompt(features: Features, text: Float[np.ndarray, " C"], fps: float) -> dict[int, float]:
    """Score CLIP's image features of every frame against the prompt's text features.

    Choice: the paper says only "prompt alignment"; this is the cosine of image and original prompt, which CLIP cuts at 77 tokens.
    """
    return score_windows(normalise_rows(features.astype(np.float64)) @ normalise_rows(text.astype(np.float64)), fps)
