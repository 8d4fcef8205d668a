"""Stutter: whether a video moves in every frame, or only where one latent's frames end and the next latent's begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import tee

import numpy as np
from torch import Tensor

from cf_model.codec.interface import Codec


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


def measure_reconstruction(codec: Codec, frames: Iterator[Tensor]) -> tuple[float, float | None]:
    """Measure PSNR in dB and stutter of a clip that was encoded and decoded, piece by piece, so that it may be long."""
    pieces, truth = tee(frames)
    shown, decoded = tee(frame for part in codec.decode_stream(codec.encode_stream(pieces)) for frame in part[0])
    pairs = zip(decoded, (frame for part in truth for frame in part[0]), strict=True)
    error = [float((ours.double() - true.double()).square().mean()) for ours, true in pairs]
    psnr = 10 * np.log10(255**2 / max(float(np.mean(error)), 1e-12))
    return float(psnr), measure_stutter((frame.numpy() for frame in shown), period=codec.time)
