"""The light decoder: its layout, its stream, and what it refuses; random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cf_model.codec.light_decoder import LightCodec, LightDecoder, load_light_decoder
from cf_model.codec.wan_codec import WanCodec
from tests import pretrained
from tests.operations import OperationCounter
from tests.small import normal


def save_random(folder: Path, channels: int = 4) -> Path:
    """Write a whole TAEHV's names: the decoder's, a growth of more frames than are wanted, and one of the encoder's."""
    torch.manual_seed(0)
    state = LightDecoder(channels).state_dict()
    state["decoder.22.weight"] *= 20  # so that pictures have contrast
    state["decoder.7.conv.weight"] = torch.cat([torch.zeros(256, 256, 1, 1), state["decoder.7.conv.weight"]])
    save_file(state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, folder / "taew.safetensors")
    return folder / "taew.safetensors"


def test_a_stream_of_chunks_is_decoded_as_one(tmp_path):
    codec = LightCodec(WanCodec(pretrained.vae()), load_light_decoder(save_random(tmp_path)))
    latents = normal(2, 5, 4, 2, 3)
    whole = codec.decode(latents)
    assert whole.shape == (2, 17, 16, 24, 3) and whole.dtype == torch.uint8 and len(whole.unique()) > 20
    pieces = list(codec.decode_stream(latents.split([3, 2], dim=1)))
    assert [piece.shape[1] for piece in pieces] == [9, 8] and torch.equal(torch.cat(pieces, dim=1), whole)
    past = latents.clone()
    past[:, 4:] = 0
    assert torch.equal(codec.decode(past)[:, :13], whole[:, :13]), "no frame sees a later one"


def test_the_modules_have_the_numbers_of_the_published_weights():
    shapes = {name: tuple(weight.shape) for name, weight in LightDecoder(16).state_dict().items()}
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3) and shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1) and shapes["decoder.20.weight"] == (64, 64, 3, 3)
    assert "decoder.8.bias" not in shapes and len(shapes) == 64


def test_a_latent_of_832_x_480_takes_half_a_teraflop():
    with torch.device("meta"):
        light, latent = LightDecoder(16), torch.randn(1, 1, 16, 60, 104)
    with OperationCounter() as counter:
        assert light(latent, {}).shape == (1, 4, 480, 832, 3)
    assert counter.get_total_flops() == pytest.approx(0.544e12, rel=0.02)


def test_what_is_no_such_decoder_is_refused(tmp_path):
    file = save_random(tmp_path, channels=16)
    with pytest.raises(ValueError, match="the light decoder takes 16 channels, but the codec's latents have 4; use a decoder that"):
        LightCodec(WanCodec(pretrained.vae()), load_light_decoder(file))
    with pytest.raises(ValueError, match="is no safetensors file, and pickles are not read here"):
        load_light_decoder(tmp_path / "taew2_1.pth")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no weights decoder.1.weight"):
        load_light_decoder(tmp_path / "other.safetensors")
    state = LightDecoder(4).state_dict()
    del state["decoder.9.conv.0.bias"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors: it lacks decoder.9.conv.0.bias"):
        load_light_decoder(tmp_path / "cut.safetensors")
