"""Places of a video compared with how the video itself first showed them, whatever has become of its exposure since.

The compass strip says which part of the circle a frame shows. The landmarks there are compared with those of the first visit, and with
those of all other headings. Before that gain and bias of each colour are fitted, so that a video that only brightens has forgotten
nothing. Sprites never enter the rows that are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from cf_model.data import worlds

from . import oracle

RATE = 4  # frames a second that are compared
FEWEST = oracle.HILL  # columns of a frame that must have come back, and be known, for it to be compared


def find_speed(truth: Mapping[str, Any], fps: float) -> float:
    """Return the usual speed of a world's camera, in units a second."""
    steps = np.abs(oracle.wrap_heading(np.diff(np.array(truth["heading"]))))
    return float(np.median(steps[steps > 0]) * fps) if (steps > 0).any() else float(worlds.SPEEDS[truth["speed"]])


def heading_metrics(heading: Float[np.ndarray, " V"], truth: Mapping[str, Any], prefix: int, speed: float) -> dict[str, float]:
    """Measure how far the camera of a continuation is from that of the world, in seconds of its `speed` (units a second).

    Where the prefix did not show where the camera turns back, a continuation may choose; real continuations say what is reached.
    """
    true = np.array(truth["heading"])[prefix : len(heading)]
    off = np.abs(oracle.wrap_heading(heading[prefix : prefix + len(true)] - true))
    return {"heading_error": float(off.mean() / speed)} if len(off) else {}


def score_places(
    video: UInt8[np.ndarray, "V Y X 3"], heading: Float[np.ndarray, " V"], *, prefix: int, fps: float, absence: float, speed: float,
    kept: Collection[int],
) -> dict[str, float]:  # fmt: skip
    """Score the places that come back after more than `absence` seconds, in the frames after a real prefix of `prefix` frames.

    revisit_skill is 1 - (error at the same heading) / (mean error at other headings): 1 is a perfect memory, 0 none. place_error is how
    far the heading with which the landmarks correlate best is from that of the compass, in seconds of a camera of `speed` units a
    second. match_quality is that correlation: noise, blur and invented landmarks lower it. Empty where nothing came back. Headings in
    `kept`, bins that a memory's sink shows for ever, are left out.
    """
    unit = video.shape[1] // 32
    width = video.shape[2] // unit
    band = oracle.crop_rows(video, worlds.LANDMARK_ROWS)[:, :, : width * unit]
    band = band.reshape(len(video), -1, unit, width, unit, 3).mean(axis=(2, 4))  # [V, rows, W, 3], a pixel a square unit
    left = np.rint(heading).astype(int) % worlds.PANORAMA
    places = (left[:, None] + np.arange(width)) % worlds.PANORAMA  # [V, W]
    returned = find_returned(places[:, oracle.EDGE : width - oracle.EDGE], round(absence * fps))  # [V, PANORAMA]
    for b in kept:
        returned[:, b * oracle.BIN : (b + 1) * oracle.BIN] = False
    inner = np.zeros((len(video), width), bool)
    inner[:, oracle.EDGE : width - oracle.EDGE] = True
    back = np.take_along_axis(returned, places, axis=1) & inner  # [V, W]
    panorama, seen = average_columns(band, places, inner & ~back)
    asked = np.arange(prefix, len(video), max(1, round(fps / RATE)))
    asked = asked[back[asked].sum(axis=1) >= FEWEST]
    if not len(asked):
        return {}
    circle = (np.arange(worlds.PANORAMA)[:, None] + np.arange(width)) % worlds.PANORAMA  # [headings, W]
    error, quality = fit_windows(band[asked], back[asked], panorama[circle].transpose(0, 2, 1, 3), seen[circle])
    own = error[np.arange(len(asked)), left[asked]]
    turned = np.abs(oracle.wrap_heading(np.arange(worlds.PANORAMA) - left[asked, None]))  # [asked, headings]
    others = np.where(turned >= oracle.HILL, error, np.nan)
    good = np.isfinite(own) & np.isfinite(others).any(axis=1)
    if not good.any():
        return {}
    best = np.where(np.isfinite(quality[good]), quality[good], -1.0).argmax(axis=1)
    rows = np.arange(len(best))
    return {
        "revisit_skill": float(1 - own[good].mean() / max(np.nanmean(others[good], axis=1).mean(), 1e-6)),
        "place_error": float(turned[good][rows, best].mean() / speed),
        "match_quality": float(quality[good][rows, best].mean()),
    }


def find_returned(places: np.ndarray, absence: int) -> Bool[np.ndarray, "V _"]:
    """Find the places of the circle that are in view again after they were out of sight for `absence` frames or more, at any time.

    `places` [V, W] are those in view in each frame.
    """
    frames = len(places)
    view = np.zeros((frames, worlds.PANORAMA), bool)
    view[np.arange(frames)[:, None], places] = True
    number = np.arange(frames)[:, None]
    # the frame in which each place was last in view, before this one; -1: never
    last = np.maximum.accumulate(np.where(view, number, -1), axis=0)
    before = np.concatenate([np.full((1, worlds.PANORAMA), -1), last[:-1]])
    away = np.where(view & (before >= 0), number - before - 1, 0)
    returned: np.ndarray = view & (np.maximum.accumulate(away, axis=0) >= absence)
    return returned


def average_columns(band: np.ndarray, places: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average the chosen columns of the frames by their place: colours [PANORAMA, rows, 3], and which places have any."""
    total, count = np.zeros((worlds.PANORAMA, band.shape[1], 3)), np.bincount(places[chosen], minlength=worlds.PANORAMA)
    np.add.at(total, places[chosen], band.transpose(0, 2, 1, 3)[chosen])
    return total / np.maximum(count, 1)[:, None, None], count > 0


def fit_windows(
    frames: Float[np.ndarray, "T R W 3"],
    back: Bool[np.ndarray, "T W"],
    windows: Float[np.ndarray, "H R W 3"],
    seen: Bool[np.ndarray, "H W"],
) -> tuple[Float[np.ndarray, "T H"], Float[np.ndarray, "T H"]]:
    """Fit every frame by gain >= 0 and bias of each colour of what is known at every heading, over the columns that both have.

    Returns the root mean square of what is left, and the correlation; nan where fewer than FEWEST columns are compared.
    """
    y, x = frames / 255 * back[:, None, :, None], windows / 255 * seen[:, None, :, None]
    rows = frames.shape[1]
    mask, have = np.repeat(back[:, None].astype(float), rows, axis=1), np.repeat(seen[:, None].astype(float), rows, axis=1)
    flat_mask, flat_have = mask.reshape(len(frames), -1), have.reshape(len(windows), -1)
    count = np.maximum(flat_mask @ flat_have.T, 1)  # [T, H] pixels
    left, whole = np.zeros_like(count), np.zeros_like(count)
    for c in range(3):
        of, to = y[..., c].reshape(len(frames), -1), x[..., c].reshape(len(windows), -1)
        mean_y, mean_x = of @ flat_have.T / count, flat_mask @ to.T / count
        var_y = np.maximum(of**2 @ flat_have.T / count - mean_y**2, 0)
        var_x = np.maximum(flat_mask @ (to**2).T / count - mean_x**2, 1e-9)
        together = np.maximum(of @ to.T / count - mean_x * mean_y, 0)
        left += np.maximum(var_y - together**2 / var_x, 0)
        whole += var_y
    few = count < FEWEST * rows
    error, quality = np.sqrt(left / 3), np.sqrt(np.maximum(1 - left / np.maximum(whole, 1e-9), 0))
    return np.where(few, np.nan, error), np.where(few, np.nan, quality)
