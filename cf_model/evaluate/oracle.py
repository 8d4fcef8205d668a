"""Metrics of the known world (cf_model/data/worlds.py): what a video shows, read off its pixels.

The compass strip gives the heading of every frame, so landmarks can be compared with those seen before at the same
heading. Lengths are in the world's units; colours in 0..255; videos are uint8 frames [V, Y, X, 3].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8

from cf_model.data import worlds

Video = UInt8[np.ndarray, "V Y X 3"]
BIN = 4  # units of heading that are compared as one
BINS = worlds.PANORAMA // BIN
EDGE = 3  # units at the picture's sides that are not read: the codec blurs them
SHORTEST_VISIT = 4  # frames
HILL = worlds.PANORAMA // worlds.LANDMARKS  # units from the middle of a hill to that of the next
GAPS = (2, 4, 8)  # seconds out of sight, each to twice itself, by which identities are told apart
READABLE = 40.0  # mean distance, in 0..255, at which a colour is still called by the palette's name
LANDMARK_TOP = worlds.LANDMARK_ROWS.start  # units of 1/32 of the picture's height above the landmarks
_PALETTE = np.array(list(worlds.COLOURS.values()), float)
_NAMES = list(worlds.COLOURS)


def crop_rows(video: Video, which: slice) -> UInt8[np.ndarray, "V R X 3"]:
    """Return a band of the picture; `which` is in the world's units."""
    unit = video.shape[1] // 32
    return video[:, which.start * unit : which.stop * unit]


def wrap_heading(difference: np.ndarray) -> np.ndarray:
    """Return differences of headings as the shorter way round, in units."""
    return (difference + worlds.PANORAMA / 2) % worlds.PANORAMA - worlds.PANORAMA / 2


def read_heading(video: Video) -> tuple[Float[np.ndarray, " V"], Float[np.ndarray, " V"]]:
    """Read the heading of the left edge, in units, and how well the columns of the strip agree on it (0..1)."""
    # the strip's hue by column [V, X], as in colorsys.rgb_to_hsv
    strip = crop_rows(video, worlds.COMPASS_ROWS).mean(axis=1) / 255
    top, low = strip.max(axis=-1), strip.min(axis=-1)
    spread = np.maximum(top - low, 1e-6)
    red, green, blue = np.moveaxis(strip, -1, 0)
    sector = np.where(top == green, (blue - red) / spread + 2, (red - green) / spread + 4)
    hue = np.where(top == red, ((green - blue) / spread) % 6, sector) / 6
    # hue minus the column's own angle is the heading: average the columns on the unit circle, grey columns left out
    columns = np.arange(video.shape[2]) / (video.shape[1] // 32)
    turn = (np.exp(2j * np.pi * (hue - columns / worlds.PANORAMA)) * (spread > 0.15)).mean(axis=1)
    return np.angle(turn) / (2 * np.pi) * worlds.PANORAMA % worlds.PANORAMA, np.abs(turn)


def find_median(values: Int16[np.ndarray, "*N K"]) -> Float[np.ndarray, "*N"]:
    """Return the median of the last axis; sorting short numbers is several times faster than np.median of floats."""
    ordered, middle = np.sort(values, axis=-1), values.shape[-1] // 2
    return ordered[..., middle].astype(float) if values.shape[-1] % 2 else ordered[..., middle - 1 : middle + 1].mean(axis=-1)


def read_sky(video: Video) -> Float[np.ndarray, "V 3"]:
    """Read the sky's colour in every frame, as the median of its rows."""
    rows = crop_rows(video, worlds.SKY_ROWS).reshape(len(video), -1, 3)
    return find_median(np.ascontiguousarray(rows.transpose(0, 2, 1)).astype(np.int16))


def _sky_colours() -> np.ndarray:
    """Return the colour of each sky in the middle of the rows that `read_sky` reads."""
    middle = (worlds.SKY_ROWS.start + worlds.SKY_ROWS.stop) / 2 / worlds.SCENE
    return np.array([np.array(a) + (np.array(b) - np.array(a)) * middle for a, b in worlds.SKIES.values()])


@dataclass(frozen=True, eq=False)
class Sprite:
    """Pixels of each palette colour that stand out of their sky row, and the extent of the most common colour."""

    counts: Float[np.ndarray, "V 6"]  # in square units
    wide: Float[np.ndarray, " V"]  # standard deviation of the pixels' places, units; nan where too few
    high: Float[np.ndarray, " V"]


def find_sprite(video: Video) -> Sprite:
    """Find the sprite in every frame as the vivid pixels that differ from the sky of their row."""
    unit, frames, colours = video.shape[1] // 32, len(video), len(_PALETTE)
    region = crop_rows(video, worlds.SPRITE_ROWS)
    # the median of the row is the sky, [V, rows, 3]: no sprite is half as wide as the picture
    planes = np.ascontiguousarray(region.transpose(0, 1, 3, 2)).astype(np.int16)  # [V, rows, 3, X]
    twice = 2 * find_median(planes)
    red, green, blue = (planes[:, :, c] for c in range(3))
    away = sum(np.abs(2 * planes[:, :, c] - twice[:, :, c, None].astype(np.int16)) for c in range(3))
    vivid = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue) > 60
    # of the pixels that stand out, and of them alone, the nearest colour of the palette
    frame, row, column = np.nonzero((away > 180) & vivid)
    nearest = ((region[frame, row, column, None].astype(np.int32) - _PALETTE.astype(np.int32)) ** 2).sum(axis=-1).argmin(axis=-1)
    counts = np.bincount(frame * colours + nearest, minlength=frames * colours).reshape(frames, colours)
    chosen = nearest == counts.argmax(axis=1)[frame]
    frame, total = frame[chosen], counts.max(axis=1)
    extent = []
    for place in (column[chosen] / unit, row[chosen] / unit):
        mean = np.bincount(frame, place, frames) / np.maximum(total, 1)
        extent.append(np.sqrt(np.bincount(frame, (place - mean[frame]) ** 2, frames) / np.maximum(total, 1)))
    few = total < 8 * unit**2
    return Sprite(counts / unit**2, np.where(few, np.nan, extent[0]), np.where(few, np.nan, extent[1]))


def average_differences(first: UInt8[np.ndarray, "V Y X 3"], second: UInt8[np.ndarray, "V Y X 3"]) -> Float[np.ndarray, " V"]:
    """Average the absolute difference of two videos over each frame; in bytes and a few frames at a time, because that is fast."""
    out = np.empty(len(first))
    for k in range(0, len(first), 64):
        a, b = first[k : k + 64], second[k : k + 64]
        out[k : k + 64] = (np.maximum(a, b) - np.minimum(a, b)).reshape(len(a), -1).sum(axis=1, dtype=np.uint32)
    return out / first[0].size if len(first) else out


def measure_motion(video: Video) -> Float[np.ndarray, " V-1"]:
    """Measure the mean change from each frame to the next, in 0..255."""
    return average_differences(video[1:], video[:-1])


def measure_sharpness(video: Video) -> Float[np.ndarray, " V"]:
    """Measure the mean difference of pixels beside each other in the scene, in 0..255 a unit."""
    scene = crop_rows(video, slice(0, worlds.SCENE))
    return average_differences(scene[:, :, 1:], scene[:, :, :-1]) * (video.shape[1] // 32)


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read off a video's frames once, and measured several times."""

    heading: Float[np.ndarray, " V"]
    coherence: Float[np.ndarray, " V"]
    sky: Float[np.ndarray, "V 3"]
    sprite: Sprite
    sharpness: Float[np.ndarray, " V"]
    motion: Float[np.ndarray, " V-1"]

    def cut(self, first: int) -> Reading:
        """Return the reading of the frames from `first` on."""
        sprite = Sprite(self.sprite.counts[first:], self.sprite.wide[first:], self.sprite.high[first:])
        sharpness, motion = self.sharpness[first:], self.motion[first:]
        return Reading(self.heading[first:], self.coherence[first:], self.sky[first:], sprite, sharpness, motion)


def read_frames(video: Video) -> Reading:
    """Read a video's frames."""
    heading, coherence = read_heading(video)
    return Reading(heading, coherence, read_sky(video), find_sprite(video), measure_sharpness(video), measure_motion(video))


def plain_metrics(video: Video) -> dict[str, float]:
    """Measure what can be measured of any video: sharpness and motion."""
    return {"sharpness": float(measure_sharpness(video).mean()), "motion": float(measure_motion(video).mean())}


def judge_frames(found: Reading, truth: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " V"]]:
    """Judge each frame by what the caption says of it."""
    colours, wanted = _sky_colours(), list(worlds.SKIES).index(truth["sky"])
    ratio = np.log(np.maximum(found.sprite.wide, 0.1) / np.maximum(found.sprite.high, 0.1))
    shape = np.where(ratio > 0.45, "bar", np.where(ratio < -0.35, "post", "disc"))
    return {
        "compass_coherence": found.coherence,
        "sky_accuracy": ((found.sky[:, None] - colours) ** 2).sum(-1).argmin(axis=1) == wanted,
        "sky_error": np.abs(found.sky - colours[wanted]).mean(axis=1),
        "sprite_recall": found.sprite.counts[:, _NAMES.index(truth["colour"])] >= 8,
        "shape_accuracy": (shape == truth["shape"]) & ~np.isnan(ratio),  # no sprite has no shape
        "sharpness": found.sharpness,
    }


def prompt_metrics(found: Reading, truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """Measure how much of the caption a video shows, and how it moves."""
    step = wrap_heading(np.diff(found.heading))
    own_colour = found.sprite.counts[:, _NAMES.index(truth["colour"])]
    out = {name: values.mean() for name, values in judge_frames(found, truth).items()} | {
        "motion": found.motion.mean(),
        "sprite_precision": own_colour.sum() / max(found.sprite.counts.sum(), 1.0),
        "speed": np.abs(step).mean() * fps,
        "jitter": np.abs(np.diff(step)).mean() * fps,
    }
    return {name: float(value) for name, value in out.items()}


@dataclass(frozen=True, eq=False)
class Visit:
    """Stretch of frames in which a bin of heading is in view, with its landmark colours there."""

    bin: int
    first: int
    last: int  # the frame after the visit
    colour: Float[np.ndarray, "rows 3"]  # median over the visit


def find_visits(video: Video, turn: Float[np.ndarray, " V"]) -> list[Visit]:
    """Find a video's visits to every bin of heading, in the order of their beginnings; `turn` is the heading that each frame shows."""
    unit = video.shape[1] // 32
    band, width = crop_rows(video, worlds.LANDMARK_ROWS), video.shape[2] / unit
    # where each bin's middle stands in the picture, in units from the left edge, [BINS, V]
    place = wrap_heading(np.arange(BINS)[:, None] * BIN + BIN / 2 - turn)
    inside = np.pad((place > EDGE) & (place < width - EDGE), ((0, 0), (1, 1))).astype(np.int8)
    (bins, firsts), (_, lasts) = (np.nonzero(np.diff(inside) == edge) for edge in (1, -1))
    long = lasts - firsts >= SHORTEST_VISIT
    bins, firsts, lengths = bins[long], firsts[long], (lasts - firsts)[long]
    # all frames of all visits, one after the other: the visit that each is of, its number in it and in the video
    visit = np.repeat(np.arange(len(bins)), lengths)
    number = np.arange(len(visit)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    frame = firsts[visit] + number
    near = np.rint(place[bins[visit], frame] * unit).astype(int)[:, None] + np.arange(-unit, unit + 1)
    # sums over the columns near the bin's middle, which sort faster than means; rows past a visit's end sort to its end
    sums = np.full((len(bins), band.shape[1], 3, lengths.max(initial=0)), np.iinfo(np.int32).max, np.int32)
    sums[visit, :, :, number] = band[frame[:, None], :, np.clip(near, 0, video.shape[2] - 1)].sum(axis=1, dtype=np.int32)
    sums.sort(axis=-1)
    middles = (sums[np.arange(len(bins)), :, :, middle] / near.shape[1] for middle in ((lengths - 1) // 2, lengths // 2))
    colours = sum(middles) / 2  # the median of each visit, [visits, rows, 3]
    found = zip(bins.tolist(), firsts.tolist(), (firsts + lengths).tolist(), colours, strict=True)
    return sorted((Visit(*facts) for facts in found), key=lambda v: (v.first, v.bin))


def find_bins_in_view(video: Video) -> frozenset[int]:
    """Find the bins of heading whose middle stands in the picture in any frame."""
    turn, _ = read_heading(video)
    place = ((np.arange(BINS) + 0.5) * BIN - turn[:, None]) % worlds.PANORAMA  # [V, BINS], from the picture's left edge
    return frozenset(np.flatnonzero((place < video.shape[2] / (video.shape[1] // 32)).any(axis=0)).tolist())


def memory_metrics(visits: Sequence[Visit], fps: float, gap: float, *, kept: Collection[int]) -> dict[str, float]:
    """Measure whether landmarks come back as they were: colour distances of a visit to the visit before it, `gap` seconds earlier.

    The last visit, not any, because a colour that drifts slowly is not forgotten. Headings in `kept`, which a memory's sink shows for
    ever, test nothing and are left out. The mean of same_heading over videos divided by that of other_heading is the memory ratio: 0
    is a perfect memory, 1 is none. It means nothing without the diversity of the videos, because a world of a single colour would have
    a low distance everywhere.
    """
    bins = np.array([visit.bin for visit in visits], int)
    colours = np.array([visit.colour.ravel() for visit in visits]).reshape(len(visits), 3 * len(range(32)[worlds.LANDMARK_ROWS]))
    distances = np.abs(colours[:, None] - colours).mean(axis=-1)  # [visits, visits]
    same = []
    newest: dict[int, int] = {}
    for i, visit in enumerate(visits):
        before = newest.get(visit.bin)
        if before is not None and visit.bin not in kept and visit.first - visits[before].last >= gap * fps:
            same.append(distances[i, before])
        newest[visit.bin] = i
    apart = np.minimum((bins[:, None] - bins) % BINS, (bins - bins[:, None]) % BINS) * BIN
    other = distances[np.triu(apart >= HILL)]
    out = {"headings_covered": len(newest) / BINS}
    if len(other):
        out["other_heading"] = float(other.mean())
    return out | ({"same_heading": float(np.mean(same))} if same else {})


def identity_metrics(visits: Sequence[Visit], fps: float, *, kept: Collection[int]) -> dict[str, float]:
    """Measure whether a hill that comes back has the colour of its last visit, by the seconds that it was out of sight.

    identity_2s is the share of hills that were away for 2 to 4 s and are of the same one of the palette's six colours as before, and
    so on; guessing gives about 1/6. hills_readable is the share of visits to the middle of a hill, where its colour is pure, that show
    a colour of the palette; visits that do not are left out. Headings in `kept`, which a memory's sink shows, are left out too.
    """
    names = {i: decode_hill(visit.colour) for i, visit in enumerate(visits) if visit.bin % (HILL // BIN) == HILL // BIN // 2}
    returns: dict[int, list[bool]] = {gap: [] for gap in GAPS}
    newest: dict[int, int] = {}
    for i in (i for i, name in names.items() if name):
        visit, before = visits[i], newest.get(visits[i].bin)
        newest[visit.bin] = i
        away = (visit.first - visits[before].last) / fps if before is not None and visit.bin not in kept else 0.0
        for gap in (gap for gap in GAPS if gap <= away < 2 * gap):
            returns[gap].append(names[i] == names[before] if before is not None else False)
    out = {f"identity_{gap}s": float(np.mean(values)) for gap, values in returns.items() if values}
    return out | ({"hills_readable": float(np.mean([name is not None for name in names.values()]))} if names else {})


def decode_hill(colour: Float[np.ndarray, "R 3"]) -> str | None:
    """Return the palette's name for the lower rows of a hill, or None where no colour is near."""
    away = np.abs(colour[len(colour) // 2 :].mean(axis=0) - _PALETTE).mean(axis=1)
    return _NAMES[int(away.argmin())] if away.min() <= READABLE else None


def map_metrics(visits: Sequence[Visit], truth: Mapping[str, Any], *, unit: int, prefix: int, fps: float, gap: float, absence: float,
                kept: Collection[int]) -> dict[str, float]:  # fmt: skip
    """Measure landmarks after a real prefix of `prefix` frames against the true panorama at the heading that the video shows.

    map_error counts what was seen in the prefix and then was out of sight for more than `gap` seconds; map_error_recent what was seen
    in the prefix and is still, or again, in view sooner. map_error_absent counts what only a slow memory can hold: out of sight for
    more than `absence` seconds, at a heading that is not in `kept`, the headings that a memory's sink shows for ever. `unit` is in
    pixels.
    """
    band = slice(worlds.LANDMARK_ROWS.start * unit, worlds.LANDMARK_ROWS.stop * unit)
    true = worlds.paint_panorama(tuple(truth["landmarks"]), truth["sky"], unit)[band]
    errors: dict[str, list[float]] = {"map_error": [], "map_error_recent": [], "map_error_absent": []}
    oldest: dict[int, Visit] = {}
    newest: dict[int, Visit] = {}
    for visit in visits:
        before, newest[visit.bin] = newest.get(visit.bin), visit
        # only bins that were in view in the prefix and come into view again after it
        if before is None or oldest.setdefault(visit.bin, before).first >= prefix or visit.first < prefix:
            continue
        middle = int((visit.bin * BIN + BIN / 2) * unit)
        columns = np.arange(middle - unit, middle + unit + 1) % true.shape[1]
        error = float(np.abs(visit.colour - true[:, columns].mean(axis=1)).mean())
        away = (visit.first - before.last) / fps
        errors["map_error" if away > gap else "map_error_recent"].append(error)
        if away > absence and visit.bin not in kept:
            errors["map_error_absent"].append(error)
    return {name: float(np.mean(values)) for name, values in errors.items() if values}


def build_map(visits: Sequence[Visit]) -> dict[int, np.ndarray]:
    """Average the landmark colours at each heading that a video shows: bin -> [rows, 3]."""
    out: dict[int, list[np.ndarray]] = {}
    for visit in visits:
        out.setdefault(visit.bin, []).append(visit.colour)
    return {b: np.mean(colours, axis=0) for b, colours in out.items()}


def unroll_panorama(video: Video) -> UInt8[np.ndarray, "R C 3"]:
    """Lay a video's frames around the circle by the heading that each shows: the mean at every place, white where nothing was seen.

    R and C are SCENE and PANORAMA units in pixels. The sprite, which moves through the picture, is a faint trace.
    """
    unit = video.shape[1] // 32
    size = worlds.PANORAMA * unit
    first = np.rint(read_heading(video)[0] * unit).astype(int)
    places = (first[:, None] + np.arange(video.shape[2])) % size  # [V, X]
    total, count = np.zeros((size, worlds.SCENE * unit, 3)), np.zeros(size)
    np.add.at(total, places.ravel(), crop_rows(video, slice(0, worlds.SCENE)).transpose(0, 2, 1, 3).reshape(-1, worlds.SCENE * unit, 3))
    np.add.at(count, places.ravel(), 1)
    mean = np.where(count[:, None, None] > 0, total / np.maximum(count, 1)[:, None, None], 255)
    return np.rint(mean).astype(np.uint8).transpose(1, 0, 2)


def paint_truth(truth: Mapping[str, Any], unit: int) -> UInt8[np.ndarray, "R C 3"]:
    """Paint the panorama that a video should show, in the size of `unroll_panorama`."""
    return np.rint(worlds.paint_panorama(tuple(truth["landmarks"]), truth["sky"], unit)).astype(np.uint8)


def measure_diversity(maps: list[dict[int, np.ndarray]], skies: list[str]) -> float | None:
    """Average the landmark distance between videos of the same sky at equal headings; None when no two can be compared."""
    seen = np.full((len(maps), BINS, 3 * len(range(32)[worlds.LANDMARK_ROWS])), np.nan)  # nan: a heading that the video never shows
    for colours, one in zip(seen, maps, strict=True):
        for b, colour in one.items():
            colours[b] = colour.ravel()
    pairs = [np.abs(seen[i] - seen[[j for j in range(i) if skies[j] == skies[i]]]).mean(axis=-1).ravel() for i in range(len(maps))]
    distances = np.concatenate([np.empty(0), *pairs])
    distances = distances[~np.isnan(distances)]
    return float(distances.mean()) if len(distances) else None


def heading_perplexity(headings: list[Float[np.ndarray, " V"]]) -> float:
    """Return the effective number, of twelve, of headings at which the videos spend their time: exp of the entropy."""
    share = np.histogram(np.concatenate(headings), 12, (0, worlds.PANORAMA))[0].astype(float)
    share /= share.sum()
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def select_slow_columns(
    heading: Float[np.ndarray, " V"], *, start: int, chunk: int, sink: int, fast: int, columns: int, frames: int, time: int
) -> Bool[np.ndarray, "K W"]:
    """Select the columns of latents that show nothing new, and to a half or more what neither sink nor fast part shows any more.

    `heading` is that of each video frame, in units; a latent's `columns` cover 32 units; latent k is video frame k `time`. The rows
    are the `frames` latent frames from `start` on. Sink and fast part are those before the chunk that a latent frame belongs to. A
    half, because a camera that turns back shows only a few units in a chunk that the fast part has not.
    """
    left = np.floor(heading[::time]).astype(int)  # of each latent, [F]
    width = 32 // columns
    units = (left[:, None, None] + np.arange(columns)[:, None] * width + np.arange(width)) % worlds.PANORAMA  # [F, W, units of a column]
    chosen = np.zeros((frames, columns), bool)
    for k in range(frames):
        first = (start + k) // chunk * chunk
        held, before = np.zeros(worlds.PANORAMA, bool), np.zeros(worlds.PANORAMA, bool)
        held[units[:sink].ravel()] = held[units[max(0, first - fast) : first].ravel()] = True
        before[units[:first].ravel()] = True
        here = units[start + k]  # [W, units]
        chosen[k] = before[here].all(axis=1) & (held[here].mean(axis=1) <= 0.5)
    return chosen


def measure_slow_share(heading: Float[np.ndarray, " V"], *, start: int, target: int, sink: int, fast: int, time: int) -> float:
    """Measure how much of a window only the slow part can know: seen before the window, but then in neither sink nor fast part.

    `heading` is that of each video frame, in units; a picture is 32 units wide; latent k is video frame k `time`. The window is the
    `target` latent frames from `start` on, all of its columns together.
    """
    left = np.floor(heading[::time]).astype(int)  # of each latent, [F]
    seen = (left[:, None] + np.arange(32)) % worlds.PANORAMA  # [F, 32]
    before, held = np.zeros(worlds.PANORAMA, bool), np.zeros(worlds.PANORAMA, bool)
    before[seen[:start].ravel()] = True
    held[seen[:sink].ravel()] = held[seen[max(0, start - fast) : start].ravel()] = True
    return float((before & ~held)[seen[start : start + target]].mean())
