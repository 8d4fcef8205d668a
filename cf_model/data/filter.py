"""Which clips are fit to learn from: a few measures of each clip, and a threshold for each measure.

The paper keeps clips "longer than 10 s" of "high quality" and publishes no filter (sec. 4), so the rules are ours.
The measures look at every frame, squeezed to PICTURE_SIDE x PICTURE_SIDE, and need no network; each says what it can't see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from . import video

PICTURE_SIDE = 32  # pixels of the pictures that are measured
BLOCKS_PER_SIDE = 8  # of the pictures that are compared with each other: so coarse that a pan hardly changes them
SIGNATURE_FRAMES = 8  # frames of a clip in its signature
CUT_FLOOR = 2.0  # grey levels added to the usual change, so that in a still scene the noise is no cut
FLASH_FRAMES = 3  # frames; a change that is undone by then is no cut

REASONS = ("unreadable", "too_short", "wrong_fps", "clipped", "frozen", "hard_cut", "duplicate")  # in the order in which rules are tried


class FilterRules(Protocol):
    """Thresholds of the rules: params.filter."""

    @property
    def min_seconds(self) -> float: ...
    @property
    def min_fps(self) -> float: ...
    @property
    def max_clipped(self) -> float: ...
    @property
    def min_motion(self) -> float: ...
    @property
    def max_cut(self) -> float: ...
    @property
    def min_distance(self) -> float: ...


@dataclass(frozen=True, eq=False)
class ClipMeasures:
    """Measures of a clip that could be read."""

    frames: int
    fps: float
    width: int
    height: int
    clipped: float  # see video.measure_clipped_share
    motion: float  # see motion_per_second
    cut: float  # see strongest_cut
    signature: UInt8[np.ndarray, "M y x 3"]

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Rejection:
    """Why a clip is not used."""

    reason: str  # one of REASONS
    value: float | None  # the measure; None: the file can't be read, and the rule is the sentence that says why
    rule: str


def measure_clip(path: Path) -> ClipMeasures:
    """Read every frame of a file and measure them. A ValueError says in one sentence why the file can't be read."""
    probe, frames = video.read_squeezed(path, side=PICTURE_SIDE)
    small = average_blocks(frames)
    return ClipMeasures(
        frames=probe.frames,
        fps=probe.fps,
        width=probe.width,
        height=probe.height,
        clipped=video.measure_clipped_share(frames),
        motion=motion_per_second(frames, probe.fps),
        cut=strongest_cut(small, probe.fps),
        signature=draw_signature(small),
    )


def find_broken_rule(clip: ClipMeasures, accepted: dict[str, UInt8[np.ndarray, "M y x 3"]], rules: FilterRules) -> Rejection | None:
    """Return the first rule that a clip breaks, or None; `accepted` are the signatures of the clips accepted before it, by id."""
    if not clip.seconds > rules.min_seconds:
        return Rejection("too_short", clip.seconds, f"seconds > {rules.min_seconds}")
    if clip.fps < rules.min_fps:
        return Rejection("wrong_fps", clip.fps, f"fps >= {rules.min_fps}")
    if clip.clipped > rules.max_clipped:
        return Rejection("clipped", clip.clipped, f"clipped <= {rules.max_clipped}")
    if clip.motion < rules.min_motion:
        return Rejection("frozen", clip.motion, f"motion >= {rules.min_motion}")
    if clip.cut > rules.max_cut:
        return Rejection("hard_cut", clip.cut, f"cut <= {rules.max_cut}")
    if accepted:
        twin, away = find_closest(clip.signature, accepted)
        if away < rules.min_distance:
            return Rejection("duplicate", away, f"distance >= {rules.min_distance} (from {twin})")
    return None


def average_blocks(frames: UInt8[np.ndarray, "V Y X 3"]) -> Float[np.ndarray, "V y x 3"]:
    """Average frames over blocks, BLOCKS_PER_SIDE of them along each side."""
    block = PICTURE_SIDE // BLOCKS_PER_SIDE
    rows = frames.reshape(len(frames), BLOCKS_PER_SIDE, block, PICTURE_SIDE, 3).sum(2, dtype=np.uint16)
    return rows.reshape(len(frames), BLOCKS_PER_SIDE, BLOCKS_PER_SIDE, block, 3).sum(3, dtype=np.uint16).astype(np.float32) / block**2


def motion_per_second(frames: UInt8[np.ndarray, "V Y X 3"], fps: float) -> float:
    """Measure how much a frame differs from the frame a second before: mean over pixels (0..255), median over frames.

    The median, so that a clip that stands still for most of its time is not saved by one jerk. A camera on a tripod
    before a calm sea has 1.1, a static picture after H.264 less than 0.1.
    """
    step = min(max(1, round(fps)), len(frames) - 1)
    if step < 1:
        return 0.0
    apart = np.abs(frames[step:].astype(np.int16) - frames[:-step]).mean((1, 2, 3), dtype=np.float64)
    return float(np.median(apart))


def strongest_cut(small: Float[np.ndarray, "V y x 3"], fps: float) -> float:
    """Measure the largest change from a frame to the next, relative to the usual change within half a second around it.

    Block means hardly change in a pan; where everything moves fast (a whip pan, an arm before the lens), the usual
    change around is as large. The third quartile is the usual one, so that repeated frames (animation on twos,
    24 fps shown as 30) don't halve it. What is undone within FLASH frames is a flash. Dissolves go unseen.
    """
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3), dtype=np.float64)
    if len(change) <= FLASH_FRAMES:
        return 0.0
    far = np.abs(small[FLASH_FRAMES:] - small[:-FLASH_FRAMES]).mean((1, 2, 3), dtype=np.float64)
    since, until = np.concatenate([far, change[len(far) :]]), np.concatenate([change[: FLASH_FRAMES - 1], far])
    lasting = np.minimum(change, np.minimum(since, until))  # neither a flash's beginning nor its end
    reach = max(2, round(fps / 2))
    padded = np.pad(change, reach, mode="reflect" if len(change) > reach else "edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    usual = np.quantile(np.delete(around, reach, axis=1), 0.75, axis=1)
    return float((lasting / (CUT_FLOOR + usual)).max())


def draw_signature(small: Float[np.ndarray, "V y x 3"]) -> UInt8[np.ndarray, "M y x 3"]:
    """Take SIGNATURE_FRAMES frames evenly over the clip: nearly the same for a copy of another quality, size or frame rate.

    Choice: a part of a clip, or its mirror image, is not recognised as a duplicate.
    """
    moments = np.linspace(0, len(small) - 1, SIGNATURE_FRAMES).round().astype(int)
    return np.rint(small[moments]).astype(np.uint8)


def find_closest(signature: UInt8[np.ndarray, "M y x 3"], accepted: dict[str, UInt8[np.ndarray, "M y x 3"]]) -> tuple[str, float]:
    """Return the most similar of the accepted clips, and its mean absolute difference, 0..255."""
    mine = signature.astype(np.int16)
    away = {name: float(np.abs(mine - other).mean(dtype=np.float64)) for name, other in accepted.items()}
    twin = min(away, key=lambda name: away[name])
    return twin, away[twin]
