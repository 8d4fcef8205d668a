"""Video files: written with PyAV, read with decord, and read in a child process when they are not trusted yet.

decord 0.6 has traps: frames of some widths come back in the wrong shape or not at all,
AV1 can't be opened, and a damaged file may crash the process or return other frames than asked for. So every answer
is checked here, and apart.py reads unknown files in children that may die. Keep this module light: they import it.
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
# a piece of the file for every half second of video, each playable as soon as it is there
FRAGMENT_OPTIONS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000", "flush_packets": "1"}
DECORD_ERRORS = (DECORDError, RuntimeError, AssertionError, IndexError)  # what decord raises on files it can't read


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of its best video stream; `frames` is the number of frames that are really in it."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "Y X 3"]], *, fps: float, crf: int) -> int:
    """Write frames as they come to an H.264 mp4 and return how many; the same frames give the same bytes.

    The file appears under its name when it is whole. The index is put in front, so that a page can play it at once.
    """
    part = path.with_name(f".{path.name}.partial")
    try:
        count = encode_frames(part, frames, path.name, fps=fps, crf=crf, options=WHOLE_FILE_OPTIONS)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def grow_video(path: Path, frames: Iterable[UInt8[np.ndarray, "Y X 3"]], *, fps: float, crf: int) -> int:
    """As `write_video`, into NAME.partial.mp4, which plays at any moment and stays when the run is killed."""
    part = growing_path(path)
    count = encode_frames(part, frames, path.name, fps=fps, crf=crf, options=FRAGMENT_OPTIONS)
    whole = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(part)) as source, av.open(str(whole), "w", format="mp4", options=WHOLE_FILE_OPTIONS) as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
    part.unlink()
    return count


def growing_path(path: Path) -> Path:
    """The name that a video has until it is whole."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def encode_frames(part: Path, frames: Iterable[np.ndarray], name: str, *, fps: float, crf: int, options: dict[str, str]) -> int:
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
    """Open a file and count its frames without decoding them. One sentence when it is damaged or no video."""
    reader = open_reader(path)
    return describe_video(reader, path)


def read_squeezed(path: Path, *, side: int) -> tuple[VideoFacts, UInt8[np.ndarray, "V Y X 3"]]:
    """Every frame of a file, squeezed to side x side: decoding all of them is the only proof that a file is whole."""
    found = probe_video(path)
    frames = decode_frames(open_reader(path, height=side, width=side), np.arange(found.frames), path)
    return found, check_frame_shape(frames, found.frames, side, side, path)


def read_video(path: Path, *, height: int, width: int, fps: float, frames: int | None = None) -> UInt8[np.ndarray, "V Y X 3"]:
    """The frames nearest in time to 0, 1/fps, 2/fps, …, resized to cover height x width, and their middle cut out.

    A file that has this size and rate already comes back as decoded. `frames` reads only the first ones.
    """

    def cut(there: int) -> int:
        if frames is not None and there < frames:
            raise ValueError(f"{path.name} has {there} frames at {fps:g} fps, fewer than the {frames} asked for; use a longer video")
        return there if frames is None else frames

    return next(read_pieces(path, height=height, width=width, fps=fps, size=None, cut=cut))


def read_pieces(
    path: Path, *, height: int, width: int, fps: float, size: int | None, cut: Callable[[int], int]
) -> Iterator[UInt8[np.ndarray, "V Y X 3"]]:
    """What `read_video` reads, `size` frames at a time, so that a long film never lies in memory; None: all at once.

    Of n frames that there are at this rate, the first cut(n) are read.
    """
    if width in UNREADABLE_WIDTHS:
        raise ValueError(f"video.width is {width}, which decord reads wrongly (as {sorted(UNREADABLE_WIDTHS)}); use 32, 64 or wider")
    reader = open_reader(path)
    found = describe_video(reader, path)
    times = reader.get_frame_timestamp(np.arange(found.frames))[:, 0].astype(np.float64)
    wanted = select_nearest_frames(times - times[0], found, fps)
    wanted = wanted[: cut(len(wanted))]
    tall, wide = covering_size(found, height, width)
    if (tall, wide) != (found.height, found.width):
        # Choice: decord scales while it decodes (bilinear over the whole footprint of a pixel, so without aliasing):
        # a minute of full HD never lies in memory at its own size.
        reader = open_reader(path, height=tall, width=wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    for first in range(0, len(wanted), size or len(wanted)):
        some = wanted[first : first + (size or len(wanted))]
        video = check_frame_shape(decode_frames(reader, some, path), len(some), tall, wide, path)
        yield np.ascontiguousarray(video[:, top : top + height, left : left + width])


def select_nearest_frames(times: np.ndarray, found: VideoFacts, fps: float) -> np.ndarray:
    """Indices of the frames nearest to multiples of 1/fps; all of them when the file has this rate already."""
    steady = np.abs(times - np.arange(len(times)) / fps).max() < 0.5 / fps
    if steady and abs(found.fps - fps) < 1e-3 * fps:
        return np.arange(found.frames)
    end = times[-1] + 1 / found.fps
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.arange(max(1, int(end * fps + 1e-3))) / fps)


def covering_size(found: VideoFacts, height: int, width: int) -> tuple[int, int]:
    """The smallest size with the file's proportions that covers height x width and that decord can deliver."""
    wide = max(width, round(found.width * height / found.height))
    while wide in UNREADABLE_WIDTHS:
        wide += 1
    return max(height, round(found.height * wide / found.width)), wide


def open_reader(path: Path, *, height: int = -1, width: int = -1) -> Any:
    try:
        return decord.VideoReader(str(path), num_threads=1, height=height, width=width)
    except DECORD_ERRORS as error:
        raise ValueError(explain_failure(path, str(error))) from None


def describe_video(reader: Any, path: Path) -> VideoFacts:
    """Number, rate and size of the frames, checked against what the container promises."""
    shape = decode_frames(reader, np.zeros(1, np.int64), path).shape
    fps = float(reader.get_avg_fps())
    if len(shape) != 4 or shape[3] != 3 or not 0 < fps < 1000:
        raise ValueError(explain_failure(path, ""))
    found = VideoFacts(frames=len(reader), fps=fps, width=shape[2], height=shape[1])
    promised = promised_frames(path, fps)
    # Choice: a count is exact; a duration may include sound that goes on a little longer than the picture.
    if promised is not None and found.frames < promised:
        raise ValueError(f"{path.name} is cut off: its header promises {promised} frames, {found.frames} are there")
    return found


def promised_frames(path: Path, fps: float) -> int | None:
    """Frames that the container's header promises: its count, or, without one, its duration less a tolerance."""
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
    try:
        return reader.get_batch(indices).asnumpy()
    except DECORD_ERRORS as error:
        raise ValueError(explain_failure(path, str(error))) from None


def check_frame_shape(video: np.ndarray, frames: int, height: int, width: int, path: Path) -> np.ndarray:
    if video.shape != (frames, height, width, 3) or video.dtype != np.uint8:
        wanted = [frames, height, width, 3]
        raise ValueError(f"{path.name} came back as {video.dtype} {list(video.shape)}, not uint8 {wanted}; convert it to H.264")
    return video


def explain_failure(path: Path, error: str) -> str:
    """One sentence on a file that decord refused. decord's own message holds the time and memory addresses."""
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
