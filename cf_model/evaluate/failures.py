"""Failures of a video in time: resets, jumps, stalls and exposure events, each with the second at which it begins.

No paper defines them. Frames are compared one latent (4 frames) apart, because a codec that moves only between latents would make
every fourth frame look like a jump.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cf_model.codec.interface import TIME

KINDS = {
    "reset": "the picture jumps back to how the video began",
    "jump": "the picture changes at once, as at a cut",
    "stall": "nothing moves",
    "exposure": "the picture is much darker or brighter than at the video's beginning, or its pixels are clipped",
}
# Choice: a change is a jump above so many times the video's 90th percentile, plus so many levels of 0..255. Drawn worlds stay below 1.3.
JUMP = (1.75, 2.0)
BACK = 0.5  # of the distance to the beginning, that a reset leaves
STILL = 0.25  # mean change in 0..255 below which a picture stands still
STALLED = 2.0  # seconds that a stall must last
EXPOSED = (0.35, 0.25)  # change of mean luma over that of the beginning, and share of clipped pixels beyond its share, that are events
LASTING = 1.0  # seconds that an exposure event must last, and of the beginning that it is compared with
DARK, BRIGHT = 4, 251  # luma at and beyond which a pixel counts as clipped

Video = UInt8[np.ndarray, "V Y X 3"]


def find_failures(video: Video, *, fps: float, first: int = 0) -> list[dict[str, Any]]:
    """Find the failures of a video's frames from number `first` on, in the order of time: kind, second, seconds and size.

    `size` is the change over its 90th percentile (reset, jump), the mean change (stall) and the luma over that of the beginning (exposure).
    """
    frames = video[first::TIME].astype(np.int16)
    if len(frames) < 4:
        return []
    step = TIME / fps
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    away = np.abs(frames - video[0].astype(np.int16)).mean(axis=(1, 2, 3))
    found = [*find_jumps(changes, away), *find_stalls(changes, step), *find_exposure(frames, step)]
    rows: list[dict[str, Any]] = [
        {"kind": kind, "second": round(first / fps + at * step, 2), "seconds": round(length * step, 2), "size": round(size, 3)}
        for kind, at, length, size in found
    ]
    return sorted(rows, key=lambda row: (row["second"], row["kind"]))


def find_jumps(changes: Float[np.ndarray, " N"], away: Float[np.ndarray, " N+1"]) -> Iterator[tuple[str, int, int, float]]:
    """Yield resets and jumps: kind, number of the sample after it, 0, and the change over its 90th percentile."""
    usual = float(np.percentile(changes, 90))
    for k in np.flatnonzero(changes > JUMP[0] * usual + JUMP[1]):
        kind = "reset" if away[k + 1] < BACK * away[k] else "jump"
        yield kind, int(k) + 1, 0, float(changes[k] / max(usual, 1e-3))


def find_stalls(changes: Float[np.ndarray, " N"], step: float) -> Iterator[tuple[str, int, int, float]]:
    """Yield stalls: kind, first sample, samples and mean change."""
    for first, end in find_spans(changes < STILL, STALLED / step):
        yield "stall", first, end - first, float(changes[first:end].mean())


def find_exposure(frames: np.ndarray, step: float) -> Iterator[tuple[str, int, int, float]]:
    """Yield exposure events: kind, first sample, samples and luma over that of the beginning."""
    luma = frames @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    clipped, mean = ((luma <= DARK) | (luma >= BRIGHT)).mean(axis=(1, 2)), luma.mean(axis=(1, 2))
    head = max(1, round(LASTING / step))
    ratio = mean / max(float(mean[:head].mean()), 1.0)
    wrong = (np.abs(ratio - 1) > EXPOSED[0]) | (clipped - clipped[:head].mean() > EXPOSED[1])
    for first, end in find_spans(wrong, LASTING / step):
        yield "exposure", first, end - first, float(ratio[first:end].mean())


def find_spans(flags: Bool[np.ndarray, " N"], least: float) -> Iterator[tuple[int, int]]:
    """Yield first and end of every run of true flags of at least so many samples."""
    for flag, group in groupby(range(len(flags)), key=lambda k: bool(flags[k])):
        places = list(group)
        if flag and len(places) >= least:
            yield places[0], places[-1] + 1
