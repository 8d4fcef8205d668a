"""Video files written with PyAV, and what is measured of frames. Reading is in video_reader.py."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from jaxtyping import UInt8

# Choice: without macroblock trees, which read memory that was never written when frames are small: with them every
# hundredth clip of 32 x 32 came out with other bytes (x264 165, AVX), without them none of four thousand.
X264_OPTIONS = {"preset": "veryfast", "mbtree": "0"}
WHOLE_FILE_OPTIONS = {"movflags": "faststart"}
# a piece of the file for every half second of video, each playable as soon as it is written
FRAGMENT_OPTIONS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000", "flush_packets": "1"}
BLACK, WHITE = 5, 250  # at most and at least, in all three channels
HD_LINES = 720  # from so many lines on players take untagged video to be BT.709, below to be BT.601


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
        converter = VideoReformatter()
        for frame in frames:
            picture = np.ascontiguousarray(frame)
            if size is None:
                size = stream.height, stream.width = picture.shape[:2]
                if size[0] >= HD_LINES:
                    context = stream.codec_context
                    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
                    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            if picture.shape != (*size, 3) or picture.dtype != np.uint8 or size[0] % 2 or size[1] % 2:
                raise ValueError(
                    f"frame {count} of {name} is {picture.dtype} {list(picture.shape)}; "
                    f"every frame must be uint8 [height, width, 3] of one even size"
                )
            container.mux(stream.encode(convert_picture(picture, converter)))
            count += 1
        if size is None:
            raise ValueError(f"{name} would have no frames; give at least one")
        container.mux(stream.encode(None))
    return count


def convert_picture(picture: UInt8[np.ndarray, "Y X 3"], converter: VideoReformatter) -> av.VideoFrame:
    """Convert a picture to YUV: BT.601 as it always was, BT.709 from HD_LINES on, where players expect it."""
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    matrix = Colorspace.ITU709 if len(picture) >= HD_LINES else None
    return converter.reformat(frame, format="yuv420p", dst_colorspace=matrix, threads=1)


def measure_clipped_share(frames: UInt8[np.ndarray, "*V Y X 3"]) -> float:
    """Measure the share of pixels that are black or white in all three channels, over all frames."""
    red, green, blue = (frames[..., channel] for channel in range(3))
    darkest, brightest = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return float(((darkest >= WHITE) | (brightest <= BLACK)).mean())
