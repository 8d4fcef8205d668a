"""What the filter measures of a file, in a single pass from its first frame to its last, without a network.

Frames are those that the stage encode will read (VideoFile.sample), squeezed to PICTURE_SIDE x PICTURE_SIDE; sharpness, borders and text
are looked for in grey pictures of up to ANALYSIS_SIDE pixels, SECOND_LOOKS of them a second. Of every frame some numbers stay in memory,
and no pixel, so that a part of a film can be judged afterwards; an hour takes 4 MB. Each measure says what it can't see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8
from safetensors.numpy import load, save

from .video import BLACK, WHITE
from .video_reader import PictureConverter, VideoFacts, VideoFile

PICTURE_SIDE = 32  # pixels of the pictures that are measured
BLOCKS_PER_SIDE = 8  # of the pictures that are compared with each other: so coarse that a pan hardly changes them
ANALYSIS_SIDE = 160  # pixels, of the longer side; never more than the file has
SECOND_LOOKS = 2  # grey pictures a second
SIGNATURE_RATE = 4  # pictures of blocks a second, by which copies are recognised
CUT_FLOOR = 2.0  # grey levels added to the usual change, so that in a still scene the noise is no cut
FLASH_FRAMES = 3  # frames; a change that is undone by then is no cut
PIECE = 128  # frames that are measured at once
STILL = 0.05  # of the usual change: a frame that changes less repeats the one before
LEAST_CHANGE = 0.05  # grey levels; a clip that usually changes less stands still and does not stutter
BAR_LEVEL = 8  # grey levels; a border is no brighter anywhere
STROKE = 40  # grey levels between neighbouring pixels at the edge of a letter
STROKES, LETTER_ROWS = 4, 3  # edges in a row of a block, and rows with so many, from which on the block looks like text
TRACES = ("change", "lasting", "motion", "clipped", "shift", "signature", "sharpness", "borders", "text")
BLOCK = (8, 16)  # rows and columns of a block that may be text


@dataclass(frozen=True, eq=False)
class FileMeasures:
    """Traces of a file: arrays with a row for each frame at the model's rate, unless another rate is named."""

    facts: VideoFacts
    fps: float  # the model's
    change: Float[np.ndarray, " V"]  # of the blocks since the frame before; the first is 0
    lasting: Float[np.ndarray, " V"]  # of that change, what is still there FLASH_FRAMES later
    motion: Float[np.ndarray, " V"]  # difference of a frame from the one a second before, 0..255; NaN in the first second
    clipped: Float[np.ndarray, " V"]  # share of black or white pixels
    shift: Float[np.ndarray, "V 2"]  # of the whole picture since the frame before, in parts of its sides
    signature: UInt8[np.ndarray, "M y x 3"]  # SIGNATURE_RATE a second
    sharpness: Float[np.ndarray, " L"]  # SECOND_LOOKS a second, as are all below
    borders: Float[np.ndarray, "L 4"]  # share of the height or width: top, bottom, left, right
    text: UInt8[np.ndarray, "L B"]  # which blocks look like text

    @property
    def frames(self) -> int:
        return len(self.change)

    @cached_property
    def cuts(self) -> Float[np.ndarray, " V"]:
        """How much each frame is a cut: its lasting change over the usual change within half a second around it.

        Block means hardly change in a pan; where everything moves fast (a whip pan, an arm before the lens), the usual change around
        is as large. The third quartile is the usual one, so that repeated frames (animation on twos, 24 fps shown as 30) don't halve
        it. What is undone within FLASH_FRAMES is a flash. Dissolves go unseen.
        """
        change = self.change[1:].astype(np.float64)
        if len(change) <= FLASH_FRAMES:
            return np.zeros(self.frames)
        reach = max(2, round(self.fps / 2))
        padded = np.pad(change, reach, mode="reflect" if len(change) > reach else "edge")
        around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
        usual = np.quantile(np.delete(around, reach, axis=1), 0.75, axis=1)
        return np.concatenate([[0.0], self.lasting[1:] / (CUT_FLOOR + usual)])

    def measure_part(self, first: int, end: int) -> dict[str, float]:
        """Measure the frames from `first` up to `end` by every rule that looks at pictures; of no frames all measures are 0."""
        if end <= first:
            return dict.fromkeys(("clipped", "motion", "repeats", "shake", "cut", "sharpness", "border", "text"), 0.0)
        second = round(self.fps)
        motion = self.motion[first + min(second, max(1, end - first - 1)) : end]
        motion = motion[np.isfinite(motion)]
        looks = slice(*(round(frame / self.fps * SECOND_LOOKS) for frame in (first, end)))
        sharpness, borders, text = (
            trace[looks] if len(trace[looks]) else trace[-1:] for trace in (self.sharpness, self.borders, self.text)
        )
        edges = borders.min(0)
        return {
            "clipped": float(self.clipped[first:end].mean(dtype=np.float64)),
            "motion": float(np.median(motion)) if len(motion) else 0.0,
            "repeats": measure_repeats(self.change[first + 1 : end]),
            "shake": measure_shake(self.shift[first + 1 : end]),
            "cut": float(self.cuts[first + 1 : end].max(initial=0.0)),
            "sharpness": float(np.median(sharpness)),
            "border": float(1 - (1 - edges[0] - edges[1]) * (1 - edges[2] - edges[3])),
            "text": float((text.mean(0) >= 0.5).mean()),
        }

    def sign_part(self, first: int, end: int) -> UInt8[np.ndarray, "M y x 3"]:
        """Return the pictures by which copies of these frames are recognised, SIGNATURE_RATE a second."""
        start, stop = (round(frame / self.fps * SIGNATURE_RATE) for frame in (first, end))
        return self.signature[start : max(start + 1, stop)]


def measure_repeats(change: Float[np.ndarray, " V"]) -> float:
    """Measure the share of frames that repeat the one before in a clip that moves: half in animation on twos, 3/4 of 4 fps in 16."""
    if not len(change) or (usual := float(np.quantile(change, 0.9))) < LEAST_CHANGE:
        return 0.0
    return float((change < STILL * usual).mean())


def measure_shake(shift: Float[np.ndarray, "V 2"]) -> float:
    """Measure how unsteadily the picture moves: mean change of its shift from a frame to the next, in parts of its side.

    A steady pan has none, a hand that trembles by a hundredth of the picture 0.01. Turning and zooming go unseen.
    """
    return float(np.abs(np.diff(shift, axis=0)).max(1).mean()) if len(shift) > 1 else 0.0


@dataclass
class FrameMeter:
    """Measuring of frames as they come, in pieces: it remembers those of the last second."""

    fps: float
    traces: dict[str, list[np.ndarray]] = field(default_factory=dict)
    before: UInt8[np.ndarray, "W Y X 3"] | None = None  # frames of the last second
    count: int = 0

    def add(self, frames: UInt8[np.ndarray, "V Y X 3"]) -> None:
        """Measure the next frames."""
        second = max(1, round(self.fps))
        held = frames if self.before is None else np.concatenate([self.before, frames])
        known, small = len(held) - len(frames), average_blocks(held)
        change, far = (
            np.concatenate([np.zeros(min(lag, len(small))), np.abs(small[lag:] - small[:-lag]).mean((1, 2, 3), dtype=np.float64)])
            for lag in (1, FLASH_FRAMES)
        )
        motion = np.full(len(held), np.nan)
        motion[second:] = np.abs(held[second:].astype(np.int16) - held[:-second]).mean((1, 2, 3), dtype=np.float64)
        grey = held[max(0, known - 1) :].mean(3, dtype=np.float32)
        shift = find_shifts(grey)
        found = {"change": change[known:], "far": far[known:], "motion": motion[known:], "shift": shift[-len(frames) :]}
        found["clipped"] = find_clipped(frames).mean((1, 2), dtype=np.float64)
        found["small"] = np.rint(small[known:][self._choose_signature(len(frames))]).astype(np.uint8)
        for name, values in found.items():
            self.traces.setdefault(name, []).append(values.astype(np.float32) if values.dtype == np.float64 else values)
        self.before, self.count = held[-second:], self.count + len(frames)

    def _choose_signature(self, frames: int) -> list[int]:
        """Return which of the next frames are the first at or after a multiple of 1 / SIGNATURE_RATE seconds."""
        step = self.fps / SIGNATURE_RATE
        first = int(np.ceil(self.count / step))
        wanted = (round(k * step) for k in range(first, int((self.count + frames) / step) + 2))
        return [k - self.count for k in wanted if 0 <= k - self.count < frames]

    def finish(self) -> dict[str, np.ndarray]:
        """Return the traces of all frames."""
        traces = {name: np.concatenate(parts) for name, parts in self.traces.items()}
        return traces | {"lasting": find_lasting(traces["change"], traces.pop("far"))}


def find_lasting(change: Float[np.ndarray, " V"], far: Float[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """Return the part of each change that is neither a flash's beginning nor its end.

    `far` is the difference from the frame FLASH_FRAMES before: a change lasts if the frames on both sides, so far apart, differ too.
    """
    change, far = change[1:], far[FLASH_FRAMES:]
    if not len(far):
        return np.concatenate([[0.0], change]).astype(np.float32)
    since, until = np.concatenate([far, change[len(far) :]]), np.concatenate([change[: FLASH_FRAMES - 1], far])
    return np.concatenate([[0.0], np.minimum(change, np.minimum(since, until))]).astype(np.float32)


def average_blocks(frames: UInt8[np.ndarray, "V Y X 3"]) -> Float[np.ndarray, "V y x 3"]:
    """Average frames over blocks, BLOCKS_PER_SIDE of them along each side."""
    block = PICTURE_SIDE // BLOCKS_PER_SIDE
    rows = frames.reshape(len(frames), BLOCKS_PER_SIDE, block, PICTURE_SIDE, 3).sum(2, dtype=np.uint16)
    return rows.reshape(len(frames), BLOCKS_PER_SIDE, BLOCKS_PER_SIDE, block, 3).sum(3, dtype=np.uint16).astype(np.float32) / block**2


def find_clipped(frames: UInt8[np.ndarray, "*V Y X 3"]) -> np.ndarray:
    """Say of each pixel whether it is black or white in all three channels."""
    red, green, blue = (frames[..., channel] for channel in range(3))
    darkest, brightest = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return (darkest >= WHITE) | (brightest <= BLACK)


def find_shifts(grey: Float[np.ndarray, "V Y X"]) -> Float[np.ndarray, "V 2"]:
    """Find how far each picture has moved since the one before, by phase correlation, in parts of its sides; the first has not moved."""
    side = grey.shape[-1]
    if len(grey) < 2:
        return np.zeros((len(grey), 2), np.float32)
    window = np.hanning(side + 2)[1:-1].astype(np.float32)
    waves = np.fft.rfft2((grey - grey.mean((1, 2), keepdims=True)) * window[:, None] * window)
    cross = waves[1:] * waves[:-1].conj()
    peaks = np.fft.irfft2(cross / (np.abs(cross) + 1e-3), s=(side, side))
    at = peaks.reshape(len(peaks), -1).argmax(1)
    shifts = [np.zeros((1, 2), np.float32)]
    for axis, places in ((1, at // side), (2, at % side)):
        # a parabola through the peak and its neighbours gives parts of a pixel
        index = [np.arange(len(peaks)), at // side, at % side]
        left, top, right = (peaks[tuple((one + step) % side if k == axis else one for k, one in enumerate(index))] for step in (-1, 0, 1))
        bend = left - 2 * top + right
        part = np.where(np.abs(bend) > 1e-9, (left - right) / (2 * np.where(bend == 0, 1, bend)), 0).clip(-0.5, 0.5)
        shifts.append(((places + part + side / 2) % side - side / 2)[:, None] / side)
    return np.concatenate([shifts[0], np.concatenate(shifts[1:], axis=1).astype(np.float32)])


def look_closer(grey: UInt8[np.ndarray, "Y X"]) -> tuple[float, np.ndarray, np.ndarray]:
    """Measure a grey picture's sharpness, black borders, and blocks that look like text.

    Sharpness is the mean absolute Laplacian, 0..255, which a blurred or enlarged picture lacks, and so does fog. Text is a block in which
    several rows cross many strong edges; fences and foliage do so too, so only what stays in place for half of the time counts.
    """
    wide = grey.astype(np.int16)
    inner = wide[1:-1, 1:-1]
    laplacian = np.abs(4 * inner - wide[:-2, 1:-1] - wide[2:, 1:-1] - wide[1:-1, :-2] - wide[1:-1, 2:])
    borders = [_count_bar(wide.max(axis), last) / grey.shape[1 - axis] for axis in (1, 0) for last in (False, True)]
    strokes = np.abs(np.diff(wide, axis=1)) > STROKE
    rows, columns = (max(1, size // block) for size, block in zip(strokes.shape, BLOCK, strict=True))
    tall, broad = (min(size, block) for size, block in zip(strokes.shape, BLOCK, strict=True))
    blocks = strokes[: rows * tall, : columns * broad].reshape(rows, tall, columns, broad).sum(3) >= STROKES
    return (
        float(laplacian.mean()) if laplacian.size else 0.0,
        np.array(borders),
        (blocks.sum(1) >= LETTER_ROWS).reshape(-1).astype(np.uint8),
    )


def _count_bar(brightest: np.ndarray, last: bool) -> int:
    """Count the rows or columns at an edge that are black; a picture that is black all over has no borders."""
    bright = np.flatnonzero(brightest > BAR_LEVEL)
    if not len(bright):
        return 0
    return int(len(brightest) - 1 - bright[-1] if last else bright[0])


def measure_file(path: Path, *, fps: float) -> FileMeasures:
    """Read every frame of a file and measure those that the model would see. A ValueError says in one sentence why it can't be read."""
    meter, looks = FrameMeter(fps), []
    convert, scaler = PictureConverter(), VideoReformatter()
    step, count = max(1, round(fps / SECOND_LOOKS)), 0
    with VideoFile(path) as file:

        def look(frame: av.VideoFrame) -> np.ndarray:
            nonlocal count
            if count % step == 0:
                looks.append(look_closer(np.rot90(_shrink_grey(frame, scaler), file.turns)))
            count += 1
            return file.turn_picture(frame, PICTURE_SIDE, PICTURE_SIDE, convert)

        for piece in _gather_pieces(file.sample(fps, look)):
            meter.add(piece)
        facts = file.facts
    traces = meter.finish()
    sharpness, borders, text = (np.stack([np.asarray(one[k]) for one in looks]) for k in range(3))
    signature = traces.pop("small")
    return FileMeasures(facts, fps, signature=signature, sharpness=sharpness, borders=borders, text=text, **traces)


def _gather_pieces(pictures: Iterator[np.ndarray]) -> Iterator[UInt8[np.ndarray, "V Y X 3"]]:
    piece: list[np.ndarray] = []
    for picture in pictures:
        piece.append(picture)
        if len(piece) == PIECE:
            yield np.stack(piece)
            piece = []
    if piece:
        yield np.stack(piece)


def _shrink_grey(frame: av.VideoFrame, scaler: VideoReformatter) -> UInt8[np.ndarray, "Y X"]:
    """Return a frame's luma with its longer side at ANALYSIS_SIDE, or as it is if it is smaller."""
    share = min(1.0, ANALYSIS_SIDE / max(frame.width, frame.height))
    width, height = (max(2, round(size * share)) for size in (frame.width, frame.height))
    grey = scaler.reformat(frame, width=width, height=height, format="gray", threads=1)
    plane = grey.planes[0]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:height, :width]


def measure_to_bytes(path: Path, *, fps: float) -> bytes:
    """Measure a file as measure_file does, and return the measures as load_measures reads them."""
    return dump_measures(measure_file(path, fps=fps))


def dump_measures(measures: FileMeasures) -> bytes:
    """Return measures as bytes."""
    facts = measures.facts
    about = [facts.frames, facts.fps, facts.width, facts.height, facts.length.numerator, facts.length.denominator, facts.stream]
    arrays = {name: np.ascontiguousarray(getattr(measures, name)) for name in TRACES}
    head = np.frombuffer(json.dumps([measures.fps, *about]).encode(), np.uint8)
    return save(arrays | {"facts": head})


def load_measures(payload: bytes) -> FileMeasures:
    """Read what dump_measures wrote."""
    arrays = load(payload)
    fps, frames, rate, width, height, above, below, stream = json.loads(arrays.pop("facts").tobytes())
    return FileMeasures(VideoFacts(frames, rate, width, height, Fraction(above, below), stream), fps, **arrays)
