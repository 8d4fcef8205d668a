from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from cf_model.codec import wan_codec
from cf_model.codec.codec_file import load_codec, save_codec
from cf_model.codec.wan_codec import WEIGHTS, WanCodec, load_wan_codec
from tests import pretrained

# Wan2.2's VAE is built in another way, folds 2 x 2 pixels into channels, and so covers 16 pixels with a latent
OTHER = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


@pytest.fixture(scope="module", params=[{}, OTHER], ids=["2.1", "2.2"])
def codec(request: pytest.FixtureRequest) -> WanCodec:
    return WanCodec(pretrained.vae(**request.param))


def video(frames: int = 13, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(256, (batch, frames, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def latents(codec: WanCodec, frames: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(2, frames, 4, 32 // codec.space, 48 // codec.space, generator=torch.Generator().manual_seed(seed))


def constants(codec: WanCodec) -> tuple[Tensor, Tensor]:
    config = codec.vae.config
    return torch.tensor(config.latents_mean)[:, None, None], torch.tensor(config.latents_std)[:, None, None]


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@torch.no_grad()
def test_latents_are_diffusers_own_normalised(codec: WanCodec) -> None:
    mean, std = constants(codec)
    theirs = codec.vae.encode(video().permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist
    ours = codec.encode(video())
    assert ours.shape == (2, 4, 4, 32 // codec.space, 48 // codec.space)
    assert apart(ours, (theirs.mode().transpose(1, 2) - mean) / std) < 1e-5
    assert theirs.std.mean() > 0.1, "a sample would have been something else"


@torch.no_grad()
def test_pixels_are_diffusers_own(codec: WanCodec) -> None:
    mean, std = constants(codec)
    theirs = codec.vae.decode((latents(codec) * std + mean).transpose(1, 2)).sample.permute(0, 2, 3, 4, 1)
    assert apart(next(codec.pixels([latents(codec)])), theirs) < 1e-5
    frames = codec.decode(latents(codec))
    assert frames.dtype == torch.uint8 and frames.shape == (2, 25, 32, 48, 3)
    assert apart(frames.float(), (theirs + 1) * 127.5) <= 0.501


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5]], ids=str)
def test_decoding_chunk_by_chunk_is_decoding_the_whole(codec: WanCodec, sizes: list[int]) -> None:
    parts = list(codec.pixels(latents(codec).split(sizes, dim=1)))
    assert [part.shape[1] for part in parts] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
    assert apart(torch.cat(parts, dim=1), next(codec.pixels([latents(codec)]))) < 1e-5
    assert apart(parts[-1][:, -1:], next(codec.pixels([latents(codec)[:, -1:]]))) > 1e-2, "the past counts"


@pytest.mark.parametrize("sizes", [[1] * 13, [5, 4, 4], [2, 9, 2], [11, 2]], ids=str)
def test_encoding_piece_by_piece_is_encoding_the_whole(codec: WanCodec, sizes: list[int]) -> None:
    parts = list(codec.encode_stream(video().split(sizes, dim=1)))
    assert apart(torch.cat(parts, dim=1), codec.encode(video())) < 1e-5


def test_streams_may_be_read_in_turns(codec: WanCodec) -> None:
    """Also while the module's own cache is in use."""
    one, other = latents(codec, seed=1), latents(codec, seed=2)
    both = list(zip(codec.pixels(one.split(1, dim=1)), codec.pixels(other.split(1, dim=1)), strict=True))
    assert torch.equal(torch.cat([pair[0] for pair in both], dim=1), next(codec.pixels([one])))
    assert torch.equal(torch.cat([pair[1] for pair in both], dim=1), next(codec.pixels([other])))

    def disturbed() -> Iterator[Tensor]:
        for piece in video().split([5, 8], dim=1):
            codec.vae.encode(torch.zeros(1, 3, 5, 32, 32))
            yield piece

    assert torch.equal(torch.cat(list(codec.encode_stream(disturbed())), dim=1), codec.encode(video()))


def test_a_stream_holds_no_more_the_longer_it_is(codec: WanCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[list[Tensor | None]] = []
    none_yet = wan_codec.new_feature_cache

    def seen(part: torch.nn.Module) -> list[Tensor | None]:
        caches.append(none_yet(part))
        return caches[-1]

    monkeypatch.setattr(wan_codec, "new_feature_cache", seen)
    streams = (codec.pixels(latents(codec, 20).split(2, dim=1)), codec.encode_stream(video(81).split(8, dim=1)))
    for i, stream in enumerate(streams):
        held = [sum(kept.untyped_storage().nbytes() for kept in caches[i] if isinstance(kept, Tensor)) for _ in stream]
        assert held[2] == max(held) == held[-1] > 0


def test_wrong_sizes(codec: WanCodec) -> None:
    with pytest.raises(ValueError, match=rf"a video of 14 frames of 48 x 32 is not 1 \+ 4k frames of a multiple of {codec.space} pixels"):
        codec.encode(video(14))
    with pytest.raises(ValueError, match=r"a video of 14 frames of 48 x 32 is not 1 \+ 4k frames"):
        list(codec.encode_stream(video(14).split(5, dim=1)))
    with pytest.raises(ValueError, match=rf"frames of 44 x 32 is not .* of a multiple of {codec.space} pixels"):
        list(codec.encode_stream([video()[:, :, :, :44]]))
    with pytest.raises(ValueError, match="the latents have 3 channels, the codec's 4"):
        codec.decode(latents(codec)[:, :, :3])


# ------------------------------------------------------------------------------------------------------------ files


def test_there_and_back_and_diffusers_opens_it(codec: WanCodec, tmp_path: Path) -> None:
    save_codec(codec, tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert isinstance(again, WanCodec) and (again.channels, again.time, again.space) == (4, 4, codec.space)
    assert torch.equal(again.encode(video()), codec.encode(video()))
    theirs = AutoencoderKLWan.from_pretrained(tmp_path / "codec", local_files_only=True)
    assert theirs.state_dict().keys() == codec.vae.state_dict().keys()
    assert torch.equal(theirs.decoder.conv_in.weight, codec.vae.decoder.conv_in.weight)


def test_the_same_bytes_from_wherever_and_never_half_precision(tmp_path: Path) -> None:
    pretrained.vae().to(torch.bfloat16).save_pretrained(tmp_path / "pipeline/vae")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "pipeline/vae")
    for name, folder in (("a", "pipeline"), ("b", "elsewhere")):
        codec = load_wan_codec(tmp_path / folder)
        assert {weight.dtype for weight in codec.vae.parameters()} == {torch.float32}
        save_codec(codec, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_folders_that_hold_no_such_codec(tmp_path: Path) -> None:
    def broken(name: str, **changes: Tensor | None) -> Path:
        """A good folder, and then these weights changed or, with None, left out."""
        save_codec(WanCodec(pretrained.vae()), tmp_path / name)
        state = load_file(tmp_path / name / WEIGHTS) | {key.replace("__", "."): value for key, value in changes.items()}
        save_file({key: value for key, value in state.items() if value is not None}, tmp_path / name / WEIGHTS)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"safetensors: it lacks quant_conv\.bias"):
        load_codec(broken("missing", quant_conv__bias=None))
    with pytest.raises(ValueError, match="holds more, which it should not"):
        load_codec(broken("unknown", more=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"has the wrong shape for quant_conv\.bias as \[3\] for \[8\]"):
        load_codec(broken("shape", quant_conv__bias=torch.zeros(3)))
    whole = (broken("cut") / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cut/diffusion_pytorch_model\.safetensors is cut off or no safetensors file"):
        load_codec(tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="isn't there, so the folder is not whole"):
        load_codec(tmp_path / "cut")
    (tmp_path / "cut/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(ValueError, match="is of WanTransformer3DModel, not of AutoencoderKLWan"):
        load_codec(tmp_path / "cut")
    (tmp_path / "cut/codec.json").write_text(json.dumps({"kind": "dct"}))
    with pytest.raises(ValueError, match="names the kind 'dct'; known are linear and wan"):
        load_codec(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_wan_codec(tmp_path)
    with pytest.raises(ValueError, match="latents_mean of the codec has 1 values, z_dim is 4"):
        WanCodec(pretrained.vae(latents_mean=[0.0]))
