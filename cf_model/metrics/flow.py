"""Optical flow by block matching, and its statistics: variance in windows of 8 frames and spikes (Self-Forcing++, Fig. 5).

Self-Forcing++ names neither its flow network nor the scale. Here FFmpeg's `mestimate` matches blocks (EPZS), because PyAV
brings it and it needs no weights; VBench uses RAFT. So what is made of this flow carries its name, as in dynamic_degree@ffmpeg-epzs.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from jaxtyping import Float, UInt8

Flow = Float[np.ndarray, "2 R C"]
BLOCK = 16  # pixels; smaller frames are matched in blocks of 8
WINDOW = 8  # frames
SPIKE = 6.0  # median absolute deviations above the median
STILL = 1e-3  # of the short side: the deviation that a video is taken to have at least, so that noise in a still one is no spike


class FlowEstimator(Protocol):
    """Flow between a video's neighbouring frames, handed in one at a time."""

    name: str  # of the method, which the scores made of it carry

    def push(self, frame: UInt8[np.ndarray, "Y X 3"]) -> list[Flow]:
        """Take the next frame and return the flow fields, in pixels, of the pairs that are known by now."""

    def finish(self) -> list[Flow]:
        """Return the flow fields that are still to come. Over the whole video there is one fewer than frames."""


class BlockMatchingFlow:
    """Flow of blocks of 16 pixels by FFmpeg's `mestimate`, on luma; the same frames give the same flow."""

    name = "ffmpeg-epzs"

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.pushed = 0

    def open_graph(self, height: int, width: int) -> Graph:
        """Open the filter for frames of this size; ValueError for frames of fewer than four blocks to a side."""
        block = BLOCK if min(height, width) >= 8 * BLOCK else BLOCK // 2
        if min(height, width) < 4 * block:
            raise ValueError(f"frames are {width} x {height} pixels; block matching needs at least {4 * block} on each side")
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("gray"), time_base=Fraction(1, 1000))
        matcher = graph.add("mestimate", f"method=epzs:mb_size={block}:search_param=64")
        sink = graph.add("buffersink")
        source.link_to(matcher)
        matcher.link_to(sink)
        graph.configure()
        self.shape = height // block, width // block
        return graph

    def push(self, frame: UInt8[np.ndarray, "Y X 3"]) -> list[Flow]:
        """Take the next frame; flow fields come back a frame late."""
        if self.graph is None:
            self.graph = self.open_graph(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format="gray")
        picture.pts, picture.time_base = self.pushed, Fraction(1, 1000)
        self.pushed += 1
        self.graph.push(picture)
        return list(self.pull_fields(self.graph))

    def finish(self) -> list[Flow]:
        """End the stream and return the last fields."""
        if self.graph is None:
            return []
        self.graph.push(None)
        return list(self.pull_fields(self.graph))

    def pull_fields(self, graph: Graph) -> Iterator[Flow]:
        """Yield the field of every frame that the filter has done, towards the frame after it."""
        while True:
            try:
                frame = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            vectors = frame.side_data.get(Type.MOTION_VECTORS).to_ndarray()  # type: ignore[call-overload]
            ahead = vectors[vectors["source"] == 1]
            # mestimate says where a block's content comes from in the frame named by `source`; its motion_x is not set
            lengths = [ahead[f"src_{axis}"].astype(np.float32) - ahead[f"dst_{axis}"] for axis in "xy"]
            yield np.stack(lengths).reshape(2, *self.shape)


def estimate_flow(video: UInt8[np.ndarray, "V Y X 3"], estimator: FlowEstimator) -> list[Flow]:
    """Return the flow fields between all neighbouring frames of a video."""
    fields = [field for frame in video for field in estimator.push(frame)]
    return fields + estimator.finish()


def measure_magnitude(flow: Flow, short_side: int) -> float:
    """Return the mean length of a field's vectors, as a part of the frame's short side."""
    return float(np.hypot(*flow).mean() / short_side)


def score_spikes(magnitudes: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Score a video's flow magnitudes: mean, mean and largest variance in windows of 8, spikes a hundred frames; ValueError below 8.

    A spike is a magnitude above the median + 6 median absolute deviations.
    """
    if len(magnitudes) < WINDOW:
        raise ValueError(f"flow variance needs {WINDOW + 1} frames, and there are {len(magnitudes) + 1}; give a longer video")
    variances = np.lib.stride_tricks.sliding_window_view(magnitudes, WINDOW).var(axis=1)
    median = np.median(magnitudes)
    deviation = max(float(np.median(np.abs(magnitudes - median))), STILL)
    spikes = int((magnitudes > median + SPIKE * deviation).sum())
    return {
        "flow_magnitude": float(magnitudes.mean()),
        "flow_variance": float(variances.mean()),
        "flow_variance_largest": float(variances.max()),
        "flow_spikes": 100 * spikes / len(magnitudes),
    }
