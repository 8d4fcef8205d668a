"""Wan's own codec: diffusers' AutoencoderKLWan with normalised latents, and a cache of causal features for each stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cf_model.model.weights import fill_weights

from .interface import check_latent_channels, check_video_shape, group_by_latent, to_uint8

WEIGHTS = "diffusion_pytorch_model.safetensors"


class WanCodec(nn.Module):
    """Codec whose latents are (posterior mean - mean) / std, by the constants of the VAE's config; nothing is sampled.

    The first frame is a latent of its own. The VAE looks back in time through a cache of features, two frames a layer,
    which diffusers stores in the module; here each stream owns a cache, so that streams may be read in turns.
    """

    mean: Tensor  # [C, 1, 1, 1]
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        config = vae.config
        self.channels, self.time, self.space = config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial
        self.patch = config.patch_size or 1  # Wan2.2's VAE first folds pixels into channels
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            if len(values) != self.channels:
                raise ValueError(f"latents_{name} of the codec has {len(values)} values, z_dim is {self.channels}; state one each")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)
        # Choice: float32 whatever the file holds, and never in tiles: half precision and seams add up over a long video.
        self.vae = vae.float().eval().requires_grad_(False)

    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]:
        _, frames, height, width, _ = video.shape
        check_video_shape(frames, height, width, self.time, self.space)
        return torch.cat(list(self.encode_stream([video])), dim=1)

    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]:
        return torch.cat(list(self.decode_stream([latents])), dim=1)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]:
        features = new_feature_cache(self.vae.encoder)
        for run in group_by_latent(pieces, self.time):
            check_video_shape(1, run.shape[2], run.shape[3], self.time, self.space)
            count = run.shape[1]  # 1 + 4k in the first run, 4k in all others
            sizes = [1] * (count % self.time) + [self.time] * (count // self.time)
            yield torch.cat([self._encode_latent(part, features) for part in run.split(sizes, dim=1)], dim=2).transpose(1, 2)

    def _encode_latent(self, frames: UInt8[Tensor, "B V Y X 3"], features: list[Any]) -> Float[Tensor, "B C 1 H W"]:
        """Encode the frames of one latent (1 at a video's start, else 4), given the features of those before."""
        x = frames.to(self.mean.device).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)
        moments = self.vae.quant_conv(self.vae.encoder(patchify(x, self.patch), feat_cache=features, feat_idx=[0]))
        return (moments.chunk(2, dim=1)[0] - self.mean) / self.std

    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
        for pixels in self.pixels(chunks):
            yield to_uint8(pixels)

    @torch.no_grad()
    def pixels(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[Float[Tensor, "B _ Y X 3"]]:
        """Decode as `decode_stream` does, to frames in -1..1 that are not yet rounded."""
        features, first = new_feature_cache(self.vae.decoder), True
        for chunk in chunks:
            check_latent_channels(chunk, self.channels)
            parts = []
            for latent in chunk.to(self.mean.device, torch.float32).transpose(1, 2).split(1, dim=2):
                z = self.vae.post_quant_conv(latent * self.std + self.mean)
                parts.append(self.vae.decoder(z, feat_cache=features, feat_idx=[0], first_chunk=first))
                first = False
            yield unpatchify(torch.cat(parts, dim=2), self.patch).clamp(-1, 1).permute(0, 2, 3, 4, 1)


def new_feature_cache(part: nn.Module) -> list[Any]:
    """Return the cache at the start of a stream: a place for each causal convolution, which diffusers fills as frames come."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())


def save_wan_codec(codec: WanCodec, folder: Path) -> None:
    """Write the VAE as a diffusers folder."""
    codec.vae.save_pretrained(folder, safe_serialization=True)


def load_wan_codec(folder: Path) -> WanCodec:
    """Load a diffusers folder of the VAE, or of a pipeline that has it under vae/; a weight that does not fit is refused."""
    home = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (home / "config.json").is_file():
        raise ValueError(f"{home} holds no config.json; name a folder in the diffusers layout, the VAE itself or one with vae/ inside")
    settings = AutoencoderKLWan.load_config(home, local_files_only=True)
    if (kind := settings.get("_class_name")) != AutoencoderKLWan.__name__:
        raise ValueError(f"{home / 'config.json'} is of {kind}, not of {AutoencoderKLWan.__name__}; name a folder of that")
    vae = AutoencoderKLWan.from_config(settings)
    fill_weights(vae, home / WEIGHTS)
    return WanCodec(vae)
