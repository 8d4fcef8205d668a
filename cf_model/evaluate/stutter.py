"""Stutter: whether a video moves in every frame, or only where one latent's frames end and the next latent's begin."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def measure_stutter(video: Iterable[np.ndarray], *, period: int, first: int = 0) -> float | None:
    """Return the mean change from a latent's last frame to the next latent's first, over the mean change inside latents.

    `video` is uint8 frames [Y, X, 3] of which the first is a latent of its own and each later latent covers `period` frames. Changes
    between frames before number `first` do not count. 1 is a video that moves evenly; one of still pictures has a very large
    stutter. None where nothing changes at all, or no latent is complete.
    """
    changes: dict[bool, list[float]] = {True: [], False: []}
    before: np.ndarray | None = None
    for number, frame in enumerate(video):
        now = np.asarray(frame, np.float32)
        if before is not None and number > first:
            changes[number % period == 1].append(float(np.abs(now - before).mean()))
        before = now
    border, inside = (float(np.mean(changes[at])) if changes[at] else 0.0 for at in (True, False))
    return border / max(inside, 1e-3) if border or inside else None
