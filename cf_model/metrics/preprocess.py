"""Frames prepared for VBench's networks: resized, cut and scaled as its transforms do, without torchvision.

torchvision resizes tensors with `torch.nn.functional.interpolate`, so the same call gives the same pixels. Frames are float
tensors [V, 3, Y, X] in 0..255. Source: Vchitect/VBench at 45e79ec, vbench/utils.py and vbench/imaging_quality.py.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

Frames = Float[Tensor, "V 3 _ _"]  # sizes are anonymous, because a preparation changes them
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of red, green and blue
OPENAI_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LONGEST = 512  # pixels that MUSIQ sees at most
RESIZING = ("longer", "shorter", "shorter_centercrop", "None")  # imaging_quality_preprocessing_mode; VBench's default is the first


def make_tensor(video: UInt8[np.ndarray, "V Y X 3"]) -> Frames:
    """Turn decoded frames [V, Y, X, 3] into the float tensor [V, 3, Y, X] that the networks' preparations take."""
    return torch.from_numpy(video).permute(0, 3, 1, 2).float()


def resize_frames(frames: Frames, height: int, width: int, mode: str = "bilinear", *, antialias: bool = False) -> Frames:
    """Resize frames as torchvision's Resize does with a tensor; frames of this size come back as they are."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, size=(height, width), mode=mode, align_corners=False, antialias=antialias)


def resize_short_side(frames: Frames, side: int, mode: str, *, antialias: bool = False) -> Frames:
    """Resize frames so that their shorter side has `side` pixels; the longer side is rounded down, as in torchvision."""
    height, width = frames.shape[-2:]
    tall, wide = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    return resize_frames(frames, tall, wide, mode, antialias=antialias)


def crop_center(frames: Frames, side: int) -> Frames:
    """Cut a square out of the middle, as torchvision's CenterCrop does with frames that are large enough."""
    top, left = (round((size - side) / 2) for size in frames.shape[-2:])
    return frames[..., top : top + side, left : left + side]


def normalise_colours(frames: Frames, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Frames:
    """Scale 0..255 to 0..1, subtract each colour's mean and divide by its deviation."""
    mean, deviation = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in statistics)
    return (frames / 255 - mean) / deviation


def prepare_dino(frames: Frames, side: int = 224) -> Frames:
    """Prepare frames for DINO: short side to `side`, bilinear without anti-aliasing, not cut (so 480 x 832 becomes 224 x 388)."""
    return normalise_colours(resize_short_side(frames, side, "bilinear"), IMAGENET)


def prepare_clip(frames: Frames, side: int = 224) -> Frames:
    """Prepare frames for CLIP: short side to `side`, bicubic without anti-aliasing, cut to a square."""
    return normalise_colours(crop_center(resize_short_side(frames, side, "bicubic"), side), OPENAI_CLIP)


def prepare_dinov2(frames: Frames, side: int = 224) -> Frames:
    """Prepare frames for DINOv2 as VBench-Long does: short side to 8/7 of `side`, bicubic with anti-aliasing, cut to a square."""
    resized = resize_short_side(frames, side * 8 // 7, "bicubic", antialias=True)
    return normalise_colours(crop_center(resized, side), IMAGENET)


def prepare_imaging(frames: Frames, resizing: str = "longer") -> Frames:
    """Prepare frames for MUSIQ, in 0..1: a side above 512 pixels is reduced to 512, and both sides are rounded down.

    `resizing` says which side counts (RESIZING); the default is VBench's own.
    """
    if resizing not in RESIZING:
        raise ValueError(f"resizing is {resizing}; it must be one of {', '.join(RESIZING)}")
    height, width = frames.shape[-2:]
    side = max(height, width) if resizing == "longer" else min(height, width)
    if resizing != "None" and side > LONGEST:
        scale = LONGEST / side
        frames = resize_frames(frames, int(scale * height), int(scale * width))
        if resizing == "shorter_centercrop":
            frames = crop_center(frames, LONGEST)
    return frames / 255


def sample_middle_frames(count: int, total: int) -> Int[np.ndarray, " count"]:
    """Return the indices of the middle frames of `count` equal parts of `total` frames; the last is repeated if there are fewer."""
    if total < 1:
        raise ValueError("a video without frames has no middle frames; give at least one frame")
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    middles = (edges[:-1] + edges[1:] - 1) // 2
    return np.concatenate([middles, np.full(count - len(middles), middles[-1])])
