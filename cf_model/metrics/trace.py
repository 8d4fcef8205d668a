"""What is measured of a video while it is decoded once, a few frames at a time: features, differences, flow and thumbnails.

A minute at 832 x 480 is 1.2 GB of frames; a trace holds some numbers a frame and a small preview, so memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from cf_model.metrics import drift, flow, long, preprocess, repetition, vbench, windowed
from cf_model.metrics.encoders import (
    PINNED,
    ClipEncoder,
    FrameEncoder,
    HubEncoder,
    PooledEncoder,
    TextImageEncoder,
    list_missing,
    open_encoder,
    open_head,
)  # fmt: skip

Video = UInt8[np.ndarray, "V Y X 3"]
Piece = UInt8[np.ndarray, "_ Y X 3"]  # frames of a video whose pieces differ in length
PREVIEW_RATE = 2  # frames a second that a judge sees
PREVIEW_SIDE = 512  # pixels of the longer side


@dataclass
class Networks:
    """What a video is scored with; a role that is None is not scored."""

    subject: FrameEncoder | None = None  # DINO
    anchor: FrameEncoder | None = None  # DINOv2
    background: FrameEncoder | None = None  # CLIP ViT-B/32
    text: TextImageEncoder | None = None  # the same CLIP, where it can encode prompts
    aesthetic: FrameEncoder | None = None  # CLIP ViT-L/14
    aesthetic_head: tuple[np.ndarray, float] | None = None  # LAION's linear head: weight [C] and bias
    make_flow: Callable[[], flow.FlowEstimator] | None = flow.BlockMatchingFlow
    flow_name: str = flow.BlockMatchingFlow.name
    interpolate: vbench.Interpolator | None = None
    interpolator: str = "@mean"  # what the scores made with `interpolate` carry in their names; AMT's carry nothing
    quality: Callable[[preprocess.Frames], Float[torch.Tensor, " V"]] | None = None  # MUSIQ: frames in 0..1 to 0..100


def average_neighbours(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Make the frame between two frames as their mean: a stand-in for AMT, by the name of `mean`."""
    return (before + after) / 2


def open_networks(weights: Path | None, device: torch.device) -> Networks:
    """Open the encoders whose folders are in `weights`; without any, frames are compared by their pooled pixels.

    Raises ValueError for a folder that has none of them.
    """
    there = [] if weights is None else [role for role in PINNED if not list_missing([role], weights)]
    if weights is not None and not there:
        raise ValueError(f"--weights {weights} has none of the folders {', '.join(PINNED)}; `cf fetch-weights --out {weights}` makes them")
    found: dict[str, HubEncoder] = {role: open_encoder(role, weights / role, device) for role in there if weights}
    pooled, text = PooledEncoder(), found.get("clip")
    networks = Networks(
        subject=found.get("dino", pooled),
        anchor=found.get("dinov2", pooled),
        background=text or pooled,
        text=text if isinstance(text, ClipEncoder) else None,
        interpolate=average_neighbours,
    )
    head = weights / "aesthetic-head.safetensors" if weights else None
    if "clip-large" in found and head and head.is_file():
        networks.aesthetic, networks.aesthetic_head = found["clip-large"], open_head(head)
    return networks


@dataclass
class Trace:
    """Measurements of a video of `frames` frames."""

    frames: int
    fps: float
    height: int
    width: int
    features: dict[str, np.ndarray] = field(default_factory=dict)  # role -> [V, C]
    anchors: dict[int, np.ndarray] = field(default_factory=dict)  # frame -> DINOv2's features, of the frames that scores read
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # luma, colour, sharpness, clipped
    differences: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [V-1]
    interpolation: np.ndarray | None = None  # [V-2], of frames 1 to V-2
    magnitudes: np.ndarray | None = None  # [V-1], of the flow between neighbouring frames
    sampled_flow: np.ndarray | None = None  # [V-interval]: score of the flow from frame k to frame k + interval
    imaging: np.ndarray | None = None  # [V], 0..100
    thumbnails: np.ndarray = field(default_factory=lambda: np.zeros((0, repetition.SIDE, repetition.SIDE, 3), np.float32))
    preview: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 2, 3), np.uint8))
    preview_fps: float = PREVIEW_RATE


class FlowTrack:
    """Flow between frames that are `interval` apart, for every frame: one estimator for each frame's place in the interval."""

    def __init__(self, make: Callable[[], flow.FlowEstimator], interval: int, reduce: Callable[[flow.Flow], float]) -> None:
        self.estimators, self.reduce = [make() for _ in range(interval)], reduce
        self.values: list[list[float]] = [[] for _ in range(interval)]

    def push(self, index: int, frame: UInt8[np.ndarray, "Y X 3"]) -> None:
        """Take frame number `index`."""
        place = index % len(self.estimators)
        self.values[place] += map(self.reduce, self.estimators[place].push(frame))

    def finish(self, frames: int) -> np.ndarray:
        """Return the reduced flow from each frame to the one an interval later."""
        interval = len(self.estimators)
        out = np.full(max(0, frames - interval), np.nan)
        for place, estimator in enumerate(self.estimators):
            values = self.values[place] + [self.reduce(one) for one in estimator.finish()]
            out[place::interval] = values[: len(out[place::interval])]
        return out


def list_anchor_frames(frames: int, fps: float) -> Int[np.ndarray, " W"]:
    """Return the frames that DINOv2 is needed for: frame 0, the windows of the table, and the first frames of VBench-Long's clips."""
    starts = [clip[0] for clip in long.split_into_clips(frames, fps)] if int(fps) >= 1 else []
    return np.unique(np.concatenate([windowed.list_window_frames(frames, fps), np.array(starts, int)]))


class Tracer:
    """Measures a video as its frames come in."""

    def __init__(self, networks: Networks, *, frames: int, fps: float, height: int, width: int) -> None:
        self.networks, self.trace, self.count = networks, Trace(frames, fps, height, width), 0
        self.tail = np.zeros((0, height, width, 3), np.uint8)
        self.parts: dict[str, list[np.ndarray]] = {}
        self.encoders = {"subject": networks.subject, "background": networks.background, "aesthetic": networks.aesthetic}
        self.wanted = set(list_anchor_frames(frames, fps).tolist()) if networks.anchor else set()
        short = min(height, width)
        self.near = FlowTrack(networks.make_flow, 1, lambda one: flow.measure_magnitude(one, short)) if networks.make_flow else None
        self.far = FlowTrack(networks.make_flow, vbench.choose_interval(fps), vbench.score_flow) if networks.make_flow else None
        self.preview_step = max(1, round(fps / PREVIEW_RATE))
        self.trace.preview_fps = fps / self.preview_step

    def add(self, video: Video) -> None:
        """Measure the next frames."""
        joined = np.concatenate([self.tail, video])
        self.append_part("differences", vbench.measure_differences(joined[max(len(self.tail) - 1, 0) :]))
        if self.networks.interpolate and len(joined) > 2:
            self.append_part("interpolation", vbench.measure_interpolation(joined, self.networks.interpolate))
        self.tail = joined[-2:]
        for name, values in drift.measure_frames(video).items():
            self.append_part(f"statistics/{name}", values)
        self.append_part("thumbnails", repetition.make_thumbnails(video))
        for role, encoder in self.encoders.items():
            if encoder:
                self.append_part(f"features/{role}", encoder.encode(video))
        self.encode_anchors(video)
        if self.networks.quality:
            self.append_part("imaging", self.networks.quality(preprocess.prepare_imaging(preprocess.make_tensor(video))).numpy())
        for index, frame in enumerate(video, self.count):
            for track in filter(None, (self.near, self.far)):
                track.push(index, frame)
        self.append_part("preview", shrink_preview(video[-self.count % self.preview_step :: self.preview_step]))
        self.count += len(video)

    def append_part(self, name: str, values: np.ndarray) -> None:
        """Put the values of some frames behind those before."""
        self.parts.setdefault(name, []).append(values)

    def encode_anchors(self, video: Video) -> None:
        """Encode with DINOv2 those of the frames that scores read."""
        places = [k for k in range(len(video)) if self.count + k in self.wanted]
        if places and self.networks.anchor:
            rows = self.networks.anchor.encode(video[places])
            self.trace.anchors |= {self.count + k: row for k, row in zip(places, rows, strict=True)}

    def finish(self) -> Trace:
        """Return the trace; ValueError if fewer frames came than were announced, or fewer than two."""
        if self.count != self.trace.frames or self.count < 2:
            raise ValueError(f"the video has {self.count} frames, not {self.trace.frames} and at least 2; replace it by a whole one")
        done = {name: np.concatenate(values) for name, values in self.parts.items()}
        for name, values in done.items():
            group, _, part = name.partition("/")
            if part:
                getattr(self.trace, group)[part] = values
            else:
                setattr(self.trace, group, values)
        self.trace.magnitudes = self.near.finish(self.count) if self.near else None
        self.trace.sampled_flow = self.far.finish(self.count) if self.far else None
        return self.trace


def shrink_preview(video: Video) -> UInt8[np.ndarray, "V _ _ 3"]:
    """Reduce frames for a judge, so that their longer side has at most 512 pixels."""
    height, width = video.shape[1:3]
    scale = min(1.0, PREVIEW_SIDE / max(height, width))
    if scale == 1.0 or not len(video):
        return video if len(video) else np.zeros((0, max(1, round(height * scale)), max(1, round(width * scale)), 3), np.uint8)
    frames = preprocess.resize_frames(preprocess.make_tensor(video), round(height * scale), round(width * scale), antialias=True)
    return frames.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def trace_video(pieces: Iterable[Piece], networks: Networks, *, frames: int, fps: float, height: int, width: int) -> Trace:
    """Trace a video from its frames, which come in pieces of any length."""
    tracer = Tracer(networks, frames=frames, fps=fps, height=height, width=width)
    for piece in pieces:
        tracer.add(piece)
    return tracer.finish()


def name_metric(metric: str, encoder: FrameEncoder | None) -> str:
    """Return a metric's name with the suffix of the network that it is made with."""
    return metric + (encoder.suffix if encoder else "")


def describe_weights(networks: Networks) -> Mapping[str, str]:
    """Return what each role's network is: repository and revision, or a hash."""
    roles = {role: getattr(networks, role) for role in ("subject", "anchor", "background", "text", "aesthetic")}
    return {role: encoder.weights for role, encoder in roles.items() if encoder}
