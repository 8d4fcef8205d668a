"""Encoders on small random networks of the published classes: what they compute, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cf_model.metrics import encoders, preprocess
from tests.metrics.small_networks import write_networks
from tests.once import made_once

RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (18, 48, 84, 3), dtype=np.uint8)  # more frames than a batch


@pytest.fixture(scope="module")
def networks() -> Path:
    return made_once("small-metric-networks", write_networks)


def test_dino_is_the_class_token_of_the_uncut_frame(networks: Path) -> None:
    encoder = encoders.open_encoder("dino", networks / "dino")
    features = encoder.encode(VIDEO)
    frames = preprocess.prepare_dino(preprocess.make_tensor(VIDEO[17:]), 32)
    assert frames.shape[-2:] == (32, 56)  # 84 * 32 / 48
    with torch.no_grad():
        there = encoder.model(frames, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    np.testing.assert_allclose(features[17:], there, atol=1e-5)


def test_dinov2_is_the_normalised_class_token(networks: Path) -> None:
    encoder = encoders.open_encoder("dinov2", networks / "dinov2")
    with torch.no_grad():
        there = encoder.model(preprocess.prepare_dinov2(preprocess.make_tensor(VIDEO), 28)).pooler_output
    np.testing.assert_allclose(encoder.encode(VIDEO), there, atol=1e-5)
    assert preprocess.prepare_dinov2(torch.zeros(1, 3, 480, 832)).shape == (1, 3, 224, 224)


def test_clip_puts_frames_and_texts_into_one_space(networks: Path) -> None:
    encoder = encoders.ClipEncoder("clip", networks / "clip")
    pixels = preprocess.prepare_clip(preprocess.make_tensor(VIDEO[:2]), 32)
    # the text between padding, as CLIP's own code has it: the end token's features are those of the text alone
    ids = torch.tensor([[*encoder.tokenizer.encode("A cat").ids, 13, 13]])
    with torch.no_grad():
        out = encoder.model(pixel_values=pixels, input_ids=ids)
    image, text = encoder.encode(VIDEO[:2]), encoder.encode_text("A cat")
    np.testing.assert_allclose(image / np.linalg.norm(image, axis=1, keepdims=True), out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(text / np.linalg.norm(text), out.text_embeds[0], atol=1e-5)


def test_a_long_text_is_cut_and_keeps_its_end(networks: Path) -> None:
    encoder = encoders.ClipEncoder("clip", networks / "clip")
    words = "a red boat sails past the blue sea"
    cut, whole = encoder.encode_text(f"{words} at sunset a cat a dog"), encoder.encode_text(f"{words} at sunset")
    np.testing.assert_array_equal(cut, whole)  # 12 tokens: the first, ten words, the last
    assert np.abs(cut - encoder.encode_text(words)).max() > 1e-3


def test_scores_of_other_weights_carry_another_name(networks: Path, tmp_path: Path) -> None:
    encoder = encoders.open_encoder("dino", networks / "dino")
    assert encoder.suffix == "@dino" and encoder.weights.startswith("sha256:")
    home = write_networks(tmp_path, "dino") / "dino"
    pinned, file = encoders.PINNED["dino"], home / "model.safetensors"
    record = {"repository": pinned.repository, "revision": pinned.revision, "sha256": {file.name: encoders.hash_file(file)}}
    (home / encoders.RECORD).write_text(json.dumps(record))
    genuine = encoders.open_encoder("dino", home)
    assert genuine.suffix == "" and genuine.weights == f"{pinned.repository}@{pinned.revision}"
    (home / encoders.RECORD).write_text(json.dumps(record | {"revision": "0" * 40}))
    assert encoders.open_encoder("dino", home).suffix == "@dino"
    state = load_file(file)
    state["layernorm.bias"] += 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was fetched; remove the folder and fetch it again"):
        encoders.open_encoder("dino", home)


def test_folders_of_other_networks_are_refused(networks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a dinov2 network, and dino must be a vit; name the folder of another"):
        encoders.open_encoder("dino", networks / "dinov2")
    with pytest.raises(ValueError, match=r"nowhere holds no config\.json; `cf fetch-weights --out DIR` writes"):
        encoders.open_encoder("dino", tmp_path / "nowhere")
    home = write_networks(tmp_path, "dino", "clip") / "dino"
    (tmp_path / "clip/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json isn't there"):
        encoders.open_encoder("clip", tmp_path / "clip")
    state = load_file(home / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, home / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its network, among them layernorm\.weight"):
        encoders.open_encoder("dino", home)
    (home / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        encoders.open_encoder("dino", home)


def test_the_head_is_read_from_tensors_alone(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1, 8), "bias": torch.tensor([5.0])}, tmp_path / "head.pth")
    encoders.save_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    weight, bias = encoders.open_head(tmp_path / "head.safetensors")
    assert weight.tolist() == [1.0] * 8 and bias == 5
    torch.save({"weight": Path("x")}, tmp_path / "code.pth")  # an object: reading it would run its code
    with pytest.raises(ValueError, match="holds something else than tensors"):
        encoders.save_head(tmp_path / "code.pth", tmp_path / "code.safetensors")


def test_pooled_pixels_stand_in_where_there_are_no_weights() -> None:
    features = encoders.PooledEncoder().encode(VIDEO)
    assert features.shape == (18, 192) and np.abs(features.reshape(18, 3, 64).mean(axis=2)).max() < 1e-3
