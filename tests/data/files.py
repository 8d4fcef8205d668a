"""Video files of every kind that FFmpeg in PyAV writes, in which a frame's grey level tells its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from hypothesis import strategies as st

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
RATES = [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60)]
PAIRS = [(container, codec) for container, (_, codecs) in KINDS.items() for codec in codecs]


def level(number: int) -> int:
    """Grey level of frame `number`."""
    return 20 + number * 7 % LEVELS * 9


class Film(NamedTuple):
    """What a film is written with."""

    container: str
    codec: str
    rate: Fraction
    times: list[int]  # of its frames, in units of 1 / rate


@st.composite
def draw_film(draw: st.DrawFn) -> Film:
    """Draw a container and a codec, a rate, a beginning, and in some containers times at a variable rate."""
    (container, codec), rate = draw(st.sampled_from(PAIRS)), draw(st.sampled_from(RATES))
    begin, count = draw(st.integers(0, 90)), draw(st.integers(12, 70))
    begin = 0 if container == "avi" else begin  # in an AVI a later beginning is frames that were dropped
    steps = [1] * count
    if container in ("matroska", "webm", "mp4") and draw(st.booleans()):
        steps = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return Film(container, codec, rate, [int(time) for time in np.cumsum([begin, *steps[:-1]])])


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
