"""Video files: written with PyAV, read with decord.

decord 0.6 has traps: frames of some widths come back in the wrong shape or not at all, AV1 can't be opened, and a
damaged file may crash the process or return other frames than asked for. So every answer is checked here, and unknown
files are read in child processes (subprocess_reader.py). Keep this module light, because each child imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
from av.error import FFmpegError
from decord import DECORDError
from jaxtyping import UInt8

UNREADABLE_WIDTHS = frozenset({8, 12, 16, 24, 48, 72})  # decord 0.6 returns the wrong shape or raises
# Choice: without macroblock trees, which read memory that was never written when frames are small: with them every
# hundredth clip of 32 x 32 came out with other bytes (x264 165, AVX), without them none of four thousand.
X264_OPTIONS = {"preset": "veryfast", "mbtree": "0"}
WHOLE_FILE_OPTIONS = {"movflags": "faststart"}
# a piece of the file for every half second of video, each playable as soon as it is written
FRAGMENT_OPTIONS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000", "flush_packets": "1"}
BLACK, WHITE = 5, 250  # at most and at least, in all three channels
DECORD_ERRORS = (DECORDError, RuntimeError, AssertionError, IndexError)  # what decord raises on files it can't read


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a file's best video stream; `frames` counts the frames that are really in the file."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "Y X 3"]], *, fps: float, crf: int) -> int:
    """Write frames as they come to an H.264 mp4 and return their number; the same frames give the same bytes.

    The file appears under its name when it is complete. The index is put in front, so that a page can play it at once.
    """
    part = path.with_name(f".{path.name}.partial")
    try:
        count = encode_frames(part, frames, path.name, fps=fps, crf=crf, options=WHOLE_FILE_OPTIONS)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def grow_video(path: Path, frames: Iterable[UInt8[np.ndarray, "Y X 3"]], *, fps: float, crf: int) -> int:
    """Write as `write_video` does, by way of NAME.partial.mp4, which plays at any moment and stays when the run is killed."""
    part = growing_path(path)
    count = encode_frames(part, frames, path.name, fps=fps, crf=crf, options=FRAGMENT_OPTIONS)
    # the same packets once more, with the index in front
    final = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(part)) as source, av.open(str(final), "w", format="mp4", options=WHOLE_FILE_OPTIONS) as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
        os.replace(final, path)
    finally:
        final.unlink(missing_ok=True)
    part.unlink()
    return count


def growing_path(path: Path) -> Path:
    """Return the name that a growing video has until it is complete."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def encode_frames(part: Path, frames: Iterable[np.ndarray], name: str, *, fps: float, crf: int, options: dict[str, str]) -> int:
    """Encode frames to an mp4 at `part` and return their number; raises ValueError, naming `name`, for a frame that does not fit."""
    count, size = 0, None
    with av.open(str(part), "w", format="mp4", options=options) as container:
        # Choice: one thread, because x264's rate control depends on the number of threads.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264_OPTIONS | {"crf": str(crf)})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = np.ascontiguousarray(frame)
            if size is None:
                size = stream.height, stream.width = picture.shape[:2]
            if picture.shape != (*size, 3) or picture.dtype != np.uint8 or size[0] % 2 or size[1] % 2:
                raise ValueError(
                    f"frame {count} of {name} is {picture.dtype} {list(picture.shape)}; "
                    f"every frame must be uint8 [height, width, 3] of one even size"
                )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            count += 1
        if size is None:
            raise ValueError(f"{name} would have no frames; give at least one")
        container.mux(stream.encode(None))
    return count


def probe_video(path: Path) -> VideoFacts:
    """Open a file and count its frames without decoding them. A ValueError says if it is damaged or no video."""
    return describe_video(open_reader(path), path)


def read_squeezed(path: Path, *, side: int) -> tuple[VideoFacts, UInt8[np.ndarray, "V Y X 3"]]:
    """Read every frame of a file, squeezed to side x side: decoding all of them is the only proof that none is missing."""
    facts = probe_video(path)
    frames = decode_frames(open_reader(path, height=side, width=side), np.arange(facts.frames), path)
    return facts, check_frame_shape(frames, facts.frames, side, side, path)


def read_video(path: Path, *, height: int, width: int, fps: float, frames: int | None = None) -> UInt8[np.ndarray, "V Y X 3"]:
    """Read the frames nearest in time to 0, 1/fps, 2/fps, …, resized to cover height x width, and cut to their middle.

    A file that has this size and rate already comes back as decoded. `frames` limits their number.
    """

    def cut(count: int) -> int:
        if frames is not None and count < frames:
            raise ValueError(f"{path.name} has {count} frames at {fps:g} fps, fewer than the {frames} asked for; use a longer video")
        return count if frames is None else frames

    return next(read_pieces(path, height=height, width=width, fps=fps, size=None, cut=cut))


def read_pieces(
    path: Path, *, height: int, width: int, fps: float, size: int | None, cut: Callable[[int], int]
) -> Iterator[UInt8[np.ndarray, "V Y X 3"]]:
    """Read as `read_video` does, `size` frames at a time (None: all at once), so that a long film never lies in memory.

    Of the n frames that a file has at this rate, the first cut(n) are read.
    """
    if width in UNREADABLE_WIDTHS:
        raise ValueError(f"video.width is {width}, which decord reads wrongly (as {sorted(UNREADABLE_WIDTHS)}); use 32, 64 or wider")
    reader = open_reader(path)
    facts = describe_video(reader, path)
    times = reader.get_frame_timestamp(np.arange(facts.frames))[:, 0].astype(np.float64)
    wanted = select_nearest_frames(times - times[0], facts, fps)
    wanted = wanted[: cut(len(wanted))]
    tall, wide = covering_size(facts, height, width)
    if (tall, wide) != (facts.height, facts.width):
        # Choice: decord scales while it decodes (bilinear over the whole footprint of a pixel, so without aliasing):
        # a minute of full HD never lies in memory at its own size.
        reader = open_reader(path, height=tall, width=wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    for first in range(0, len(wanted), size or len(wanted)):
        some = wanted[first : first + (size or len(wanted))]
        video = check_frame_shape(decode_frames(reader, some, path), len(some), tall, wide, path)
        yield np.ascontiguousarray(video[:, top : top + height, left : left + width])


def select_nearest_frames(times: np.ndarray, facts: VideoFacts, fps: float) -> np.ndarray:
    """Return the indices of the frames nearest to multiples of 1/fps; all indices if the file has this rate already."""
    steady = np.abs(times - np.arange(len(times)) / fps).max() < 0.5 / fps
    if steady and abs(facts.fps - fps) < 1e-3 * fps:
        return np.arange(facts.frames)
    end = times[-1] + 1 / facts.fps
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.arange(max(1, int(end * fps + 1e-3))) / fps)


def covering_size(facts: VideoFacts, height: int, width: int) -> tuple[int, int]:
    """Return the smallest height and width with the file's proportions that cover height x width and that decord can deliver."""
    wide = max(width, round(facts.width * height / facts.height))
    while wide in UNREADABLE_WIDTHS:
        wide += 1
    return max(height, round(facts.height * wide / facts.width)), wide


def open_reader(path: Path, *, height: int = -1, width: int = -1) -> Any:
    """Open a file with decord, which scales to height x width if they are given; a ValueError says why it can't be opened."""
    try:
        return decord.VideoReader(str(path), num_threads=1, height=height, width=width)
    except DECORD_ERRORS as error:
        raise ValueError(explain_failure(path, str(error))) from None


def describe_video(reader: Any, path: Path) -> VideoFacts:
    """Return number, rate and size of a file's frames; raises ValueError if the container promises more frames."""
    shape = decode_frames(reader, np.zeros(1, np.int64), path).shape
    fps = float(reader.get_avg_fps())
    if len(shape) != 4 or shape[3] != 3 or not 0 < fps < 1000:
        raise ValueError(explain_failure(path, ""))
    facts = VideoFacts(frames=len(reader), fps=fps, width=shape[2], height=shape[1])
    promised = promised_frames(path, fps)
    # Choice: a count is exact; a duration may include sound that goes on a little longer than the picture.
    if promised is not None and facts.frames < promised:
        raise ValueError(f"{path.name} is cut off: its header promises {promised} frames, {facts.frames} are there")
    return facts


def promised_frames(path: Path, fps: float) -> int | None:
    """Return the frames that the container's header promises: its count, else its duration less a tolerance; None: neither is stated."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None or stream.frames:
                return stream.frames if stream else None
            stated = stream.metadata.get("DURATION", "")  # Matroska's, of the stream itself: "00:00:10.381000000"
            seconds = (container.duration or 0) / av.time_base
            if stated.count(":") == 2:
                hours, minutes, rest = (float(part) for part in stated.split(":"))
                seconds = 3600 * hours + 60 * minutes + rest
            return int((seconds - max(0.5, 0.05 * seconds)) * fps) if seconds else None
    except (FFmpegError, ValueError):
        return None


def decode_frames(reader: Any, indices: np.ndarray, path: Path) -> np.ndarray:
    """Decode the frames of these indices; a ValueError says why they can't be decoded."""
    try:
        return reader.get_batch(indices).asnumpy()
    except DECORD_ERRORS as error:
        raise ValueError(explain_failure(path, str(error))) from None


def check_frame_shape(video: np.ndarray, frames: int, height: int, width: int, path: Path) -> np.ndarray:
    """Return frames that decord delivered; raises ValueError if their number, size or type is not what was asked for."""
    if video.shape != (frames, height, width, 3) or video.dtype != np.uint8:
        wanted = [frames, height, width, 3]
        raise ValueError(f"{path.name} came back as {video.dtype} {list(video.shape)}, not uint8 {wanted}; convert it to H.264")
    return video


def explain_failure(path: Path, error: str) -> str:
    """Explain in a sentence why decord refused a file, because its own message holds the time and memory addresses."""
    if not path.is_file():
        return f"{path.name} is not there; check its name"
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            codec, width = (stream.codec_context.codec.canonical_name, stream.width) if stream else ("", 0)
    except (FFmpegError, ValueError):
        return f"{path.name} is not a video, or has lost its header; replace it"
    if not codec:
        return f"{path.name} has no video stream; replace it"
    if width in UNREADABLE_WIDTHS:
        return f"{path.name} is {width} pixels wide, which decord reads wrongly (as {sorted(UNREADABLE_WIDTHS)}); resize it"
    if "cannot find video stream" in error:
        return f"{path.name} is {codec}, which decord cannot decode; convert it to H.264"
    return f"{path.name} is damaged: not all of its frames can be decoded; replace it"


def measure_clipped_share(frames: UInt8[np.ndarray, "*V Y X 3"]) -> float:
    """Measure the share of pixels that are black or white in all three channels, over all frames."""
    red, green, blue = (frames[..., channel] for channel in range(3))
    darkest, brightest = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return float(((darkest >= WHITE) | (brightest <= BLACK)).mean())
