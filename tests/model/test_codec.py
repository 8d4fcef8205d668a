import numpy as np
import pytest
import torch

from cf_model.codec.codec_file import load_codec, save_codec
from cf_model.codec.interface import latent_frames, video_frames
from cf_model.codec.linear import CodecSpec, fit_codec
from cf_model.data import worlds
from cf_model.evaluate.stutter import measure_stutter


@pytest.fixture(scope="module")
def clips():
    return [torch.from_numpy(worlds.render_clip(worlds.draw_world(seed), 33, height=32, width=32, fps=16)) for seed in range(6)]


@pytest.fixture(scope="module")
def codec(clips):
    return fit_codec(clips, CodecSpec(channels=12, ridge=1e-4, width=16, steps=5, batch=4, lr=1e-3), seed=0)


def psnr(a, b):
    return 10 * np.log10(255**2 / float((a.double() - b.double()).square().mean()))


def test_frames_and_latents():
    assert [latent_frames(n) for n in (1, 5, 81, 84, 109)] == [1, 2, 21, 21, 28]
    assert all(latent_frames(video_frames(n)) == n for n in range(1, 50))


def test_there_and_back(codec, clips):
    latents = codec.encode(clips[0][None])
    assert latents.shape == (1, 9, 12, 4, 4) and 0.5 < float(latents.std()) < 2
    back = codec.decode(latents)
    assert back.shape == (1, 33, 32, 32, 3) and back.dtype == torch.uint8
    assert psnr(back[0], clips[0]) > 26


def test_neighbours_take_the_block_edges_away(codec, clips):
    """A patch-by-patch inverse is the same map without its neighbours; its edges at multiples of 8 are far worse."""
    frames = codec.decode(codec.encode(clips[1][None]))[0].float()
    flat = (codec.encode(clips[1][None])[0].permute(0, 2, 3, 1) @ torch.linalg.pinv(codec.encoder) + codec.mean).view(9, 4, 4, 8, 8, 3)
    blocky = flat.permute(0, 1, 3, 2, 4, 5).reshape(9, 32, 32, 3).add(1).mul(127.5).clamp(0, 255)

    def edges(video):
        steps = (video.diff(dim=2) - clips[1][::4].float().diff(dim=2)).abs().mean(dim=(0, 1, 3))
        return float(steps[7::8].mean() / steps.mean())

    assert edges(frames[::4]) < 0.8 * edges(blocky)


def test_a_latent_depends_on_frames_up_to_its_own_and_its_frames_on_latents_up_to_it(codec, clips):
    video, latents = clips[3][None], codec.encode(clips[3][None])
    other = video.clone()
    other[:, 17:] = 255 - other[:, 17:]  # latent 4 covers frames 13 to 16
    assert torch.equal(codec.encode(other)[:, :5], latents[:, :5]) and not torch.equal(codec.encode(other)[:, 5], latents[:, 5])
    changed = latents.clone()
    changed[:, 5:] += 1
    assert torch.equal(codec.decode(changed)[:, :17], codec.decode(latents)[:, :17])


def test_what_happens_between_the_latents_frames_is_kept(clips):
    """A codec that shows a latent's four frames as one picture has a stutter of hundreds."""
    codec = fit_codec(clips, CodecSpec(channels=12, ridge=1e-4, width=16, steps=150, batch=16, lr=2e-3), seed=0)
    back = codec.decode(codec.encode(clips[0][None]))[0].numpy()
    assert measure_stutter(clips[0].numpy(), period=4) < 1.1 and measure_stutter(back, period=4) < 1.5
    still = np.concatenate([back[:1], back[4::4].repeat(4, axis=0)])
    assert measure_stutter(still, period=4) > 100


def test_chunk_by_chunk_is_whole(codec, clips):
    latents = codec.encode(clips[2][None])
    parts = torch.cat(list(codec.decode_stream(latents.split(3, dim=1))), dim=1)
    assert int((parts.int() - codec.decode(latents).int()).abs().max()) <= 1  # convolutions round by batch size


@pytest.mark.parametrize("sizes", [[1] * 33, [5, 8, 20], [2, 31]], ids=str)
def test_piece_by_piece_is_whole(codec, clips, sizes):
    parts = list(codec.encode_stream(clips[2][None].split(sizes, dim=1)))
    assert torch.allclose(torch.cat(parts, dim=1), codec.encode(clips[2][None]), atol=1e-5)
    with pytest.raises(ValueError, match="32 frames of 32 x 32 is not 1 \\+ 4k"):
        list(codec.encode_stream(clips[2][None, :32].split(8, dim=1)))


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(ValueError, match="the latents have 8 channels, the codec's 12; use the codec that they were made with"):
        codec.decode(torch.zeros(1, 2, 8, 4, 4))


def test_fitting_again_gives_the_same_bytes(clips, tmp_path):
    for name in ("a", "b"):
        save_codec(fit_codec(clips, CodecSpec(8, 1e-4, 8, 3, 4, 1e-3), seed=0), tmp_path / name)
    assert (tmp_path / "a/codec.safetensors").read_bytes() == (tmp_path / "b/codec.safetensors").read_bytes()
    again = load_codec(tmp_path / "a")
    assert again.channels == 8


def test_what_is_not_a_codec_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no codec\.json; run the stage codec"):
        load_codec(tmp_path)


def test_a_clip_of_the_wrong_length_is_refused(codec, clips):
    with pytest.raises(ValueError, match="34 frames of 32 x 32 is not 1 \\+ 4k"):
        codec.encode(torch.cat([clips[0], clips[0][:1]])[None])
