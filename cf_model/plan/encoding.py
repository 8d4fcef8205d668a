"""Estimate what the stage encode writes and computes: bytes of latents and index, shards, and hours on the plan's hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cf_model.codec.interface import SPACE, latent_frames

from .hardware import Hardware
from .table import MIB, format_bytes, format_duration

PAPER_CLIPS = 40_000  # sec. 4
INDEX_ROW = 1024  # bytes of a clip's row of index.parquet with a caption of some thousand letters, of which compression leaves half
# Operations of Wan's encoder for a pixel of a clip's first frame, and of each further frame, which shares a latent with three others.
# A test compares them with PyTorch's own counting. They grow a little with the picture, by the attention in the middle of the encoder.
WAN_FIRST, WAN_FURTHER = 6.81e6, 5.04e6
COLOURS = 3


@dataclass(frozen=True)
class EncodingNeed:
    """What one clip of the profile's length takes."""

    clip_bytes: float  # of its latents
    shard_mib: float  # encode.shard_mib
    operations: float  # of the codec

    def count_shards(self, clips: int) -> int:
        """Return the number of files of so many clips' latents."""
        return math.ceil(clips / max(1, int(self.shard_mib * MIB // self.clip_bytes)))

    def format_line(self, clips: int, machine: Hardware) -> str:
        """Return a sentence on so many clips, as `cf plan` prints it."""
        hours = clips * self.operations / (machine.ranks * machine.tflops * 1e12) / 3600
        sizes = f"{format_bytes(clips * self.clip_bytes)} in {self.count_shards(clips):,} shards of {self.shard_mib:g} MiB"
        return f"{sizes}, an index of about {format_bytes(clips * INDEX_ROW)}, {format_duration(hours)} in the codec"


def estimate_clip(kind: str, frames: int, size: tuple[int, int, int], dtype: str, shard_mib: float) -> EncodingNeed:
    """Return the need of a clip; `size`: channels of a latent, height and width in pixels."""
    channels, height, width = size
    stored = (4 if dtype == "float32" else 2) * latent_frames(frames) * channels * (height // SPACE) * (width // SPACE)
    return EncodingNeed(stored, shard_mib, count_codec_operations(kind, channels, frames, height * width))


def count_codec_operations(kind: str, channels: int, frames: int, pixels: int) -> float:
    """Count the operations of encoding a clip of so many frames of so many pixels; kind is wan, or linear: one matrix product."""
    if kind == "wan":
        return pixels * (WAN_FIRST + (frames - 1) * WAN_FURTHER)
    return 2.0 * COLOURS * channels * pixels * frames
