"""TODO: what cf_model.codec.interface is for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

TIME, SPACE = 4, 8  # frames and pixels that one latent covers


def latent_frames(frames: int) -> int:
    """Whole latents in a clip: 1 + (frames - 1) // 4."""
    return 1 + (frames - 1) // TIME


def video_frames(latents: int) -> int:
    return 1 + TIME * (latents - 1)


class Codec(Protocol):
    """What the stages know of a codec. It takes tensors of any device; latents come back on its own, video on the CPU.

    The two streams give what `encode` and `decode` give, a piece at a time, and need no more memory for a longer video.
    Several may be read in turns.
    """

    channels: int
    time: int  # frames that one latent covers
    space: int  # pixels, each way

    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]: ...

    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]: ...

    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]: ...

    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]: ...

    def to(self, device: Any) -> Codec: ...


def group_by_latent(pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]], time: int) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
    """The same frames in runs that fill latents: first 1 + k `time` of them, then multiples of `time`."""
    held: Tensor | None = None
    seen, first = 0, 1
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=1)
        seen += piece.shape[1]
        length = (held.shape[1] - first) // time * time + first
        if length > 0:
            yield held[:, :length]
            held, first = held[:, length:], 0
    if held is not None:
        check_video_shape(seen, held.shape[2], held.shape[3], time, 1)


def check_video_shape(frames: int, height: int, width: int, time: int, space: int) -> None:
    if frames < 1 or (frames - 1) % time or height % space or width % space:
        raise ValueError(f"a video of {frames} frames of {width} x {height} is not 1 + {time}k frames of a multiple of {space} pixels")


def check_latent_channels(latents: Float[Tensor, "B F C H W"], channels: int) -> None:
    if latents.shape[2] != channels:
        raise ValueError(f"the latents have {latents.shape[2]} channels, the codec's {channels}; use the codec that they were made with")


def to_uint8(pixels: Tensor) -> UInt8[Tensor, "..."]:
    """-1..1, and what lies beyond, to 0..255 on the CPU."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
