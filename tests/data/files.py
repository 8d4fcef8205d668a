"""Video files of every kind that FFmpeg in PyAV writes, in which a frame's grey level tells its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 23  # grey levels, so far apart that no codec mixes them up
# container -> ending, codecs
KINDS = {
    "mp4": ("mp4", ("libx264", "libx265", "mpeg4")),
    "mov": ("mov", ("libx264", "mpeg4")),
    "matroska": ("mkv", ("libx264", "libx265", "libvpx-vp9", "ffv1")),
    "webm": ("webm", ("libvpx", "libvpx-vp9")),
    "avi": ("avi", ("libx264", "mpeg4", "mjpeg")),
    "mpegts": ("ts", ("libx264", "mpeg2video")),
    "mpeg": ("mpg", ("mpeg1video", "mpeg2video")),
    "flv": ("flv", ("libx264",)),
    "asf": ("wmv", ("wmv2",)),
}
PAIRS = [(container, codec) for container, (_, codecs) in KINDS.items() for codec in codecs]


def level(number: int) -> int:
    """Grey level of frame `number`."""
    return 20 + number * 7 % LEVELS * 9


def write_film(
    path: Path,
    container: str,
    codec: str,
    rate: Fraction,
    times: Sequence[int],
    *,
    size: tuple[int, int] = (64, 64),
    pixel: Fraction | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> None:
    """Write a frame at each of `times`, which are multiples of 1/rate."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        context = stream.codec_context
        context.thread_count, context.time_base = 1, 1 / rate
        if codec == "libx265":
            context.options = {"x265-params": "log-level=none"}
        if codec.startswith(("mpeg", "wmv", "mjpeg", "libvpx")):
            context.bit_rate = 2_000_000
        if codec in ("mpeg2video", "mpeg4"):
            context.max_b_frames = 2
        if pixel:
            context.sample_aspect_ratio = pixel
        for number, time in enumerate(times):
            picture = np.full((*size, 3), level(number), np.uint8) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def decode_in_order(path: Path) -> tuple[list[Fraction], list[float]]:
    """Times and grey levels of all frames, as PyAV decodes them one after the other: the truth."""
    times, levels = [], []
    with av.open(str(path)) as file:
        file.streams.video[0].codec_context.thread_count = 1
        for frame in file.decode(video=0):
            times.append(frame.pts * frame.time_base)
            levels.append(float(frame.to_ndarray(format="rgb24").mean()))
    return times, levels
