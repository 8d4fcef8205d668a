"""Names, shapes and sizes: a small sample of the original, and Wan2.1-T2V-1.3B itself without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cf_model.foreign import import_checkpoint, weight_names
from cf_model.model.sizes import ModelSpec
from cf_model.model.weights import check_weights
from tasks.params import yaml_file
from tests.small import denoiser

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(**yaml_file.read_yaml(ROOT / "profiles/wan-1.3b.yaml")["model"])
GOLDEN = ROOT / "tests/golden/wan-causal"


@pytest.fixture(scope="module")
def wan() -> dict[str, tuple[int, ...]]:
    return weight_names.expected_shapes(weight_names.diffusers_config(SPEC, channels=16, text_channels=4096))


def test_wan_1_3b_has_its_tensors_and_parameters(wan: dict[str, tuple[int, ...]]) -> None:
    assert len(wan) == 825
    assert sum(torch.Size(shape).numel() for shape in wan.values()) == 1_418_996_800


def test_both_key_maps_are_bijective_and_keep_shapes(wan: dict[str, tuple[int, ...]]) -> None:
    original = weight_names.to_self_forcing(wan)
    assert len(original) == len(wan) and not weight_names.is_diffusers(original) and weight_names.is_diffusers(wan)
    assert weight_names.to_diffusers(original) == wan
    assert weight_names.to_self_forcing(weight_names.to_diffusers(original)) == original


def test_names_of_the_original_are_as_published(wan: dict[str, tuple[int, ...]]) -> None:
    """Written down from the original, not from our rules."""
    original = weight_names.to_self_forcing(wan)
    for name, shape in {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "text_embedding.0.weight": (1536, 4096),
        "time_embedding.0.weight": (1536, 256),
        "time_projection.1.weight": (9216, 1536),
        "blocks.29.self_attn.norm_q.weight": (1536,),
        "blocks.29.cross_attn.o.bias": (1536,),
        "blocks.0.norm3.weight": (1536,),
        "blocks.0.ffn.0.weight": (8960, 1536),
        "blocks.0.modulation": (1, 6, 1536),
        "head.modulation": (1, 2, 1536),
        "head.head.weight": (64, 1536),
    }.items():
        assert original[name] == shape
    assert not any(name.endswith(("norm1.weight", "norm2.weight")) for name in original)


def test_the_affine_norm_changes_its_number() -> None:
    renamed = weight_names.to_diffusers({"blocks.7.norm3.weight": 0, "blocks.7.norm3.bias": 1})
    assert renamed == {"blocks.7.norm2.weight": 0, "blocks.7.norm2.bias": 1}


def test_unknown_names_are_refused_by_name_and_count() -> None:
    odd = {f"blocks.{n}.cross_attn.k_img.weight": n for n in range(5)} | {"head.head.bias": 0}
    with pytest.raises(ValueError, match=r"^blocks\.0\.cross_attn\.k_img\.weight, blocks\.1.*blocks\.2\.\S+ and 2 more \(5 in all\)"):
        weight_names.to_diffusers(odd)


@pytest.mark.parametrize("name", ["blocks.0.norm2.weight", "blocks.x.modulation", "blocks.0.blocks.0.modulation", "", "head"])
def test_nothing_but_a_weight_of_the_original_is_renamed(name: str) -> None:
    with pytest.raises(ValueError, match="is no weight that original Wan"):
        weight_names.to_diffusers({name: 0})


def test_sizes_are_read_off_the_tensors() -> None:
    model = denoiser(layers=3).transformer
    sizes = weight_names.infer_config(model.state_dict(), heads=2)
    assert sizes == {key: model.config[key] for key in sizes}


def test_sizes_of_wan_are_read_off_its_shapes(wan: dict[str, tuple[int, ...]]) -> None:
    """12 heads, because the published ones are 128 wide."""
    found = weight_names.infer_config({name: torch.empty(shape, device="meta") for name, shape in wan.items()})
    stated = weight_names.diffusers_config(SPEC, channels=16, text_channels=4096)
    assert found == {key: value for key, value in stated.items() if key != "rope_max_seq_len"} | {"patch_size": (1, 2, 2)}


def test_heads_of_another_width_must_be_stated() -> None:
    state = denoiser().transformer.state_dict()
    with pytest.raises(ValueError, match=r"24 wide, narrower than Wan's smallest \(1536\), .*; state their number with --heads"):
        weight_names.infer_config(state)
    with pytest.raises(ValueError, match="24 wide, which 5 heads do not divide"):
        weight_names.infer_config(state, heads=5)


def test_missing_unknown_misshapen_and_quantised_are_named() -> None:
    model = denoiser().transformer
    state, shapes = dict(model.state_dict()), weight_names.expected_shapes(model.config)
    check_weights(state, shapes)
    for name in [f"blocks.1.attn1.{part}" for part in ("norm_k.weight", "norm_q.weight", "to_q.bias", "to_q.weight")]:
        del state[name]
    state["blocks.0.extra"] = torch.zeros(1)
    state["proj_out.bias"] = torch.zeros(3)
    state["scale_shift_table"] = state["scale_shift_table"].to(torch.int8)
    with pytest.raises(ValueError) as refused:
        check_weights(state, shapes)
    assert str(refused.value) == (
        "it lacks blocks.1.attn1.norm_k.weight, blocks.1.attn1.norm_q.weight, blocks.1.attn1.to_q.bias and 1 more (4 in all), and "
        "holds blocks.0.extra, which it should not, and has the wrong shape for proj_out.bias as [3] for [16], and "
        "stores scale_shift_table as int8, which is quantised; it must hold exactly the weights that its config names"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"in_channels": 36}, "takes 36 channels and gives 4"),
        ({"image_dim": 1280}, "image_dim 1280"),
        ({"num_layers": None}, "num_layers is None; it must be a whole number above 0"),
        ({"ffn_dim": 0}, "ffn_dim is 0"),
    ],
)
def test_a_config_of_another_model_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        weight_names.expected_shapes({**denoiser().transformer.config, **changed})


def test_the_golden_sample_and_its_key_map() -> None:
    """The map was made by diffusers' own converter; the weights load strictly into Self-Forcing's model."""
    stated = json.loads((GOLDEN / "keymap_selfforcing_to_diffusers.json").read_text())
    assert weight_names.to_diffusers({name: name for name in stated}) == {new: old for old, new in stated.items()}
    assert weight_names.to_self_forcing({name: name for name in stated.values()}) == stated
    sizes = json.loads((GOLDEN / "meta_selfforcing.json").read_text())["config"]
    weights = import_checkpoint.read_weights(GOLDEN / "weights_selfforcing_keys.safetensors", heads=sizes["num_heads"])
    assert set(weights.state) == set(stated.values())
    for key, name in {"num_layers": "num_layers", "ffn_dim": "ffn_dim", "text_dim": "text_dim", "in_channels": "in_dim"}.items():
        assert weights.config[key] == sizes[name]
