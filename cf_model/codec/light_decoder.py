"""Light decoder of Wan's latents in the layout of TAEHV: about a twenty-fifth of the VAE's operations, and less true to the latents.

TAEHV (github.com/madebyollin/taehv, MIT) is a stack of small 2D convolutions over frames. A memory block sees a frame and the frame
before it, so a stream needs one frame a block of the past. Its weights have the names `decoder.N...` and are imported from a
safetensors file; none are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from cf_model.model.weights import check_safetensors_header, check_weights

from .interface import Codec, check_latent_channels, to_uint8

WIDTHS = (256, 128, 64, 64)  # channels of the three levels, and before the pixels
GROWTH = (1, 2, 2)  # frames that a level makes of one; each level doubles height and width


def convolve(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Soft bound of the latents at -3 and 3."""

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """Residual block that sees each frame beside the frame before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = (convolve(2 * channels, channels), nn.ReLU(), convolve(channels, channels), nn.ReLU(), convolve(channels, channels))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B F C H W"], past: Float[Tensor, "B 1 C H W"]) -> Float[Tensor, "B F C H W"]:
        """Return the frames after the block; `past` is the frame before the first of them, zeros at a video's beginning."""
        before = torch.cat([past, x], dim=1)[:, : x.shape[1]]
        both = torch.cat([x, before], dim=2).flatten(0, 1)
        return F.relu(self.conv(both) + x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FrameGrowth(nn.Module):
    """Projection that makes `stride` frames of one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "M C H W"]:
        return self.conv(x).unflatten(1, (self.stride, x.shape[1])).flatten(0, 1)


class LightDecoder(nn.Module):
    """TAEHV's decoder, whose modules have the numbers that its weights are named by."""

    def __init__(self, channels: int, patch: int = 1) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch  # a pixel of the last level is patch x patch of the video
        layers: list[nn.Module] = [SoftClamp(), convolve(channels, WIDTHS[0]), nn.ReLU()]
        for level, stride in enumerate(GROWTH):
            width = WIDTHS[level]
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), FrameGrowth(width, stride), convolve(width, WIDTHS[level + 1], bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), convolve(WIDTHS[-1], 3 * patch**2))

    def forward(self, latents: Float[Tensor, "B F C H W"], pasts: dict[int, Tensor]) -> Float[Tensor, "B V Y X 3"]:
        """Return four frames for each latent, in 0..1; `pasts` holds each memory block's last frame and is brought up to date."""
        x, videos = latents, len(latents)
        for number, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                past = pasts.get(number)
                after = layer(x, torch.zeros_like(x[:, :1]) if past is None else past)
                pasts[number], x = x[:, -1:], after
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (videos, -1))
        pixels = F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
        return pixels.clamp(0, 1).permute(0, 1, 3, 4, 2)


class LightCodec:
    """Codec that encodes as another does and decodes lightly; the three frames that the decoder makes before the first are left out."""

    def __init__(self, codec: Codec, light: LightDecoder) -> None:
        if light.channels != codec.channels:
            problem = f"the light decoder takes {light.channels} channels, but the codec's latents have {codec.channels}"
            raise ValueError(f"{problem}; use a decoder that was made for this codec")
        grown, space = GROWTH[0] * GROWTH[1] * GROWTH[2], 2 ** len(GROWTH) * light.patch
        if (grown, space) != (codec.time, codec.space):
            ours, theirs = f"{grown} frames of {space} x {space} pixels", f"{codec.time} of {codec.space} x {codec.space}"
            problem = f"the light decoder makes {ours} of a latent, but the codec {theirs}"
            raise ValueError(f"{problem}; use a decoder that was made for this codec")
        self.codec, self.light = codec, light.eval().requires_grad_(False)
        self.channels, self.time, self.space = codec.channels, codec.time, codec.space

    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]:
        return self.codec.encode(video)

    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]:
        return self.codec.encode_stream(pieces)

    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]:
        return torch.cat(list(self.decode_stream([latents])), dim=1)

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
        pasts, before = dict[int, Tensor](), self.time - 1  # frames that come before the first latent's own
        for chunk in chunks:
            check_latent_channels(chunk, self.channels)
            frames = self.light(chunk.to(next(self.light.parameters())), pasts)
            yield to_uint8(2 * frames[:, before:].float() - 1)
            before = 0

    def to(self, device: Any) -> LightCodec:
        self.codec.to(device)
        self.light.to(device)
        return self


def load_light_decoder(file: Path) -> LightDecoder:
    """Load TAEHV's decoder from a safetensors file; the encoder's weights in it are not read. Anything else raises a ValueError."""
    if file.suffix != ".safetensors":
        problem = f"{file} is no safetensors file, and pickles are not read here"
        raise ValueError(f"{problem}; write its weights anew with safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)")
    check_safetensors_header(file)
    state = {name: weight for name, weight in load_file(file).items() if name.startswith("decoder.")}
    first, last = state.get("decoder.1.weight"), state.get("decoder.22.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise ValueError(f"{file} has no weights decoder.1.weight and decoder.22.weight, so it is no TAEHV; name one for Wan's latents")
    decoder = LightDecoder(first.shape[1], round((last.shape[0] / 3) ** 0.5))
    shapes = {name: tuple(weight.shape) for name, weight in decoder.state_dict().items()}
    # A file may hold a growth of more frames, of which the last are wanted.
    for name in [name for name in shapes if name in state and name.endswith(".conv.weight") and state[name].ndim == 4]:
        state[name] = state[name][-shapes[name][0] :]
    try:
        check_weights(state, shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    decoder.load_state_dict(state)
    return decoder
