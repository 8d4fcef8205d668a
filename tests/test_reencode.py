from __future__ import annotations

from pathlib import Path

import torch

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import CodecSpec, fit_codec
from cf_model.distillation import build_reencoder


def test_a_latent_is_encoded_anew_as_the_picture_it_ends_with(tmp_path: Path) -> None:
    """The last of the frames that the latents decode to, as a video of one frame; what came before leaves no other trace."""
    rng = torch.Generator().manual_seed(0)
    clips = [torch.randint(0, 256, (17, 16, 16, 3), generator=rng, dtype=torch.uint8) for _ in range(2)]
    codec = fit_codec(clips, CodecSpec(channels=6, ridge=1e-4, width=4, steps=0, batch=1, lr=1e-3), 0)
    save_codec(codec, tmp_path)
    latents = codec.encode(torch.stack(clips))
    picture = build_reencoder(tmp_path)(latents)
    expected = codec.encode(codec.decode(latents)[:, -1:])
    assert picture.shape == (2, 1, 6, 2, 2) and torch.allclose(picture, expected, atol=1e-6)
    assert not torch.allclose(picture, latents[:, -1:], atol=1e-2), "what a codec loses of a picture is lost again"
