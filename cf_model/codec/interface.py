"""What a codec is: 1 + 4k video frames to 1 + k latents and back, 8 pixels each way to one latent; and checks that codecs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

TIME, SPACE = 4, 8  # frames, and pixels each way, that one latent covers


def latent_frames(frames: int) -> int:
    """Count the latents in a clip of so many frames: 1 + (frames - 1) // 4; what is left over is no latent."""
    return 1 + (frames - 1) // TIME


def video_frames(latents: int) -> int:
    """Count the video frames of so many latents: 1 + 4 (latents - 1), because the first latent is one frame."""
    return 1 + TIME * (latents - 1)


class Codec(Protocol):
    """Codec as the stages use it. It takes tensors of any device; latents come back on the codec's device, video on the CPU.

    `encode_stream` and `decode_stream` give what `encode` and `decode` give, a piece at a time, and need no more memory
    for a longer video. Several streams may be read in turns.
    """

    channels: int
    time: int  # frames that one latent covers
    space: int  # pixels, each way

    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]:
        """Encode V = 1 + 4k frames to F = 1 + k latents."""
        ...

    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]:
        """Decode F = 1 + k latents to V = 1 + 4k frames."""
        ...

    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]:
        """Encode frames in pieces of any length, and yield latents as they are complete."""
        ...

    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
        """Decode latents chunk by chunk, and yield the frames of each chunk."""
        ...

    def to(self, device: Any) -> Codec: ...


def group_by_latent(pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]], time: int) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
    """Regroup frames into runs that fill latents: 1 + k `time` frames in the first run, a multiple of `time` in all others.

    Raises ValueError at the end if frames are left over.
    """
    waiting: Tensor | None = None
    count, first = 0, 1
    for piece in pieces:
        waiting = piece if waiting is None else torch.cat([waiting, piece], dim=1)
        count += piece.shape[1]
        length = (waiting.shape[1] - first) // time * time + first
        if length > 0:
            yield waiting[:, :length]
            waiting, first = waiting[:, length:], 0
    if waiting is not None:
        check_video_shape(count, waiting.shape[2], waiting.shape[3], time, 1)


def check_video_shape(frames: int, height: int, width: int, time: int, space: int) -> None:
    """Raise ValueError unless a video has 1 + k `time` frames and sides that are multiples of `space` pixels."""
    if frames < 1 or (frames - 1) % time or height % space or width % space:
        raise ValueError(f"a video of {frames} frames of {width} x {height} is not 1 + {time}k frames of a multiple of {space} pixels")


def check_latent_channels(latents: Float[Tensor, "B F C H W"], channels: int) -> None:
    """Raise ValueError for latents of another codec, which has other channels."""
    if latents.shape[2] != channels:
        raise ValueError(f"the latents have {latents.shape[2]} channels, the codec's {channels}; use the codec that they were made with")


def to_uint8(pixels: Tensor) -> UInt8[Tensor, "..."]:
    """Convert pixels from -1..1 (clamped) to 0..255 on the CPU."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
