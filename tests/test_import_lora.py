"""LoRA files of every trainer, added to the base they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cf_model.foreign import import_checkpoint, weight_names
from tasks.runner.process import is_deliberate
from tests.checkpoints import HEADS, WAN, State, before, flat, imported, pt, same
from tests.small import normal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pt(tmp_path, {"generator": before("model.", WAN)}).rename(tmp_path / "base.pt")


def pairs(rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """original name of the layer -> A and B, on every linear layer of the blocks, as LongLive and SVI have them."""
    shapes = {name.removesuffix(".weight"): t.shape for name, t in WAN.items() if name.startswith("blocks.") and t.ndim == 2}
    return {name: (normal(rank, wide, seed=n), normal(high, rank, seed=-n)) for n, (name, (high, wide)) in enumerate(shapes.items(), 1)}


PAIRS = pairs()


def merged(scale: float) -> State:
    changed = {f"{name}.weight": WAN[f"{name}.weight"] + scale * (b @ a) for name, (a, b) in PAIRS.items()}
    return weight_names.to_diffusers(WAN | changed)


def halves(prefix: str, a: str, b: str, of: Callable[[str], str] = str) -> State:
    return {f"{prefix}{of(name)}.{half}": tensor for name, pair in PAIRS.items() for half, tensor in zip((a, b), pair, strict=True)}


def to_diffusers_layer(name: str) -> str:
    return next(iter(weight_names.to_diffusers({f"{name}.weight": 0}))).removesuffix(".weight")


PEFT = halves("base_model.model.", "lora_A.default.weight", "lora_B.default.weight")
LORAS: dict[str, tuple[Callable[[Path], Path], list[str], float, str]] = {
    "LongLive": (
        lambda at: pt(at, {"generator_lora": PEFT, "critic_lora": {name: tensor + 1 for name, tensor in PEFT.items()}, "step": 3000}),
        ["--lora-alpha", "4"],
        1.0,
        "--lora-alpha",
    ),
    "peft, saved alone": (
        lambda at: adapter(at, halves("base_model.model.", "lora_A.weight", "lora_B.weight"), {"r": 4, "lora_alpha": 8}),
        [],
        2.0,
        "adapter_config.json",
    ),
    "SVI and Context Forcing": (
        lambda at: flat(at, halves("pipe.dit.", "lora_A.default.weight", "lora_B.default.weight")),
        [],
        1.0,
        "DiffSynth's rule, alpha = rank",
    ),
    "down, up and alpha (ComfyUI)": (
        lambda at: flat(at, halves("diffusion_model.", "lora_down.weight", "lora_up.weight") | alphas(2.0)),
        [],
        0.5,
        "the file",
    ),
    "diffusers' names": (
        lambda at: flat(at, halves("transformer.", "lora_A.weight", "lora_B.weight", to_diffusers_layer)),
        ["--lora-alpha", "2"],
        0.5,
        "--lora-alpha",
    ),
}


def adapter(at: Path, state: State, config: dict[str, Any]) -> Path:
    (at / "lora").mkdir()
    save_file(state, at / "lora/adapter_model.safetensors")
    (at / "lora/adapter_config.json").write_text(json.dumps(config))
    return at / "lora"


def alphas(alpha: float) -> State:
    return {f"diffusion_model.{name}.alpha": torch.tensor(alpha) for name in PAIRS}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_is_added_to_its_base(kind: str, base: Path, tmp_path: Path) -> None:
    make, words, scale, origin = LORAS[kind]
    state, facts = imported(make(tmp_path), "--base", str(base), *HEADS, *words)
    assert same(state, merged(scale))
    assert facts["layout"] == "LoRA" and facts["base"]["container"] == "generator"
    assert facts["lora"] == {"pairs": 20, "rank": 4, "alpha": 4 * scale, "alpha_from": origin}


def test_a_base_and_its_lora_in_one_file(tmp_path: Path) -> None:
    """As peft saves a whole model, and as a trainer may keep both."""
    whole = {f"{name[: -len('.weight')]}.base_layer.weight" if name[: -len(".weight")] in PAIRS else name: t for name, t in WAN.items()}
    src = pt(tmp_path, {"generator": before("base_model.model.", whole), "generator_lora": PEFT})
    state, facts = imported(src, *HEADS, "--lora-alpha", "4")
    assert same(state, merged(1.0)) and facts["container"] == "generator + generator_lora"


def test_differences_of_weights_and_biases_are_added_as_they_are(base: Path, tmp_path: Path) -> None:
    """As in lightx2v's LoRAs of Self-Forcing (ComfyUI's names): beside the pairs, biases, norms and modulations."""
    deltas = {
        "blocks.0.self_attn.q.diff_b": normal(*WAN["blocks.0.self_attn.q.bias"].shape, seed=71),
        "blocks.1.self_attn.norm_k.diff": normal(*WAN["blocks.1.self_attn.norm_k.weight"].shape, seed=72),
        "blocks.1.modulation.diff": normal(*WAN["blocks.1.modulation"].shape, seed=73),
        "head.head.diff": normal(*WAN["head.head.weight"].shape, seed=74),
    }
    targets = ("blocks.0.self_attn.q.bias", "blocks.1.self_attn.norm_k.weight", "blocks.1.modulation", "head.head.weight")
    file = halves("diffusion_model.", "lora_down.weight", "lora_up.weight") | alphas(2.0)
    file |= {f"diffusion_model.{name}": tensor for name, tensor in deltas.items()}
    state, facts = imported(flat(tmp_path, file), "--base", str(base), *HEADS)
    changed = {name: WAN[name] + delta for name, delta in zip(targets, deltas.values(), strict=True)}
    expected = merged(0.5)
    for name in targets:
        (ours,) = weight_names.to_diffusers({name: WAN[name]})
        expected[ours] = changed[name]
    assert same(state, expected) and facts["lora"]["deltas"] == 4 and facts["lora"]["pairs"] == 20


def test_a_lora_that_changes_nothing_is_said_to(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one that was saved before its training: every B is 0."""
    untrained = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in svi().items()}
    state, facts = imported(flat(tmp_path, untrained), "--base", str(base), *HEADS)
    assert same(state, merged(0.0)) and facts["lora"]["changes"].startswith("nothing")
    assert "it changes nothing: all its products are 0" in import_checkpoint.describe_import(facts)


def test_merging_happens_in_float32(base: Path, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in WAN.items()}
    torch.save({"generator": half}, base)
    src = flat(tmp_path, {name: tensor.bfloat16() for name, tensor in halves("pipe.dit.", "lora_A.weight", "lora_B.weight").items()})
    state, _ = imported(src, "--base", str(base), *HEADS)
    a, b = (tensor.bfloat16().float() for tensor in PAIRS["blocks.1.ffn.0"])
    assert torch.equal(state["blocks.1.ffn.net.0.proj.weight"], (half["blocks.1.ffn.0.weight"].float() + b @ a).bfloat16())


# --------------------------------------------------------------------------------------------------------- refusals


def refused(said: str, src: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        imported(src, *HEADS, *words)
    assert is_deliberate(error.value) and "\n" not in str(error.value)
    assert not (src.parent / "imported").exists() and not list(src.parent.glob("*.partial"))


def svi(**changed: Tensor | None) -> State:
    """SVI's file with some tensors exchanged, or taken out."""
    state: dict[str, Tensor | None] = {**halves("", "lora_A.weight", "lora_B.weight"), **changed}
    return {f"pipe.dit.{name}": value for name, value in state.items() if value is not None}


Q = "blocks.0.self_attn.q"
ELSEWHERE = r"changes blocks\.0\.attn1\.to_q\.weight, which the base lacks or has in another shape"


def pair(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"{Q}.lora_B.weight": None}, r"only one of two matrices for blocks\.0\.self_attn\.q\.weight; the file is incomplete"),
        ({f"{Q}.lora_B.weight": torch.zeros(24, 3)}, ELSEWHERE),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 25)}, ELSEWHERE),
        ({key: value for n in range(2, 7) for key, value in pair(f"blocks.{n}.ffn.0").items()}, r"blocks\.4\S+ and 2 more \(5 in all\)"),
        (pair("head.head"), r"changes proj_out\.weight"),
        (pair("patch_embedding"), r"changes patch_embedding\.weight"),
        (pair("blocks.0.self_attn.k_img"), r"blocks\.0\.self_attn\.k_img\.weight is no weight that"),
        ({f"{Q}.diff_b": torch.zeros(23)}, r"changes blocks\.0\.attn1\.to_q\.bias, which the base lacks or has in another shape"),
        ({f"{Q}.dora_scale": torch.zeros(24)}, r"holds blocks\.0\.self_attn\.q\.dora_scale beside LoRA matrices, but no whole"),
        ({f"{Q}.lora_B.weight": torch.full((24, 4), torch.nan)}, r"holds NaN or infinity in \S*blocks\.0\.self_attn\.q\.lora_B\.weight"),
        (pair("blocks.7.self_attn.q"), r"the LoRA has blocks up to number 7, the base 2 blocks\); give the base"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 40)}, r"the LoRA is for a width of 40, the base is 24 wide"),
        ({f"{Q}.lora_A.other.weight": torch.zeros(4, 24)}, r"blocks\.0\.self_attn\.q\.weight has two LoRA pairs in one file"),
        ({"blocks.0.modulation.alpha": torch.tensor(1.0)}, r"states alpha for blocks\.0\.scale_shift_table\.weight without a pair"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_by_name(changed: dict[str, Tensor | None], said: str, base: Path, tmp_path: Path) -> None:
    refused(said, flat(tmp_path, svi(**changed)), "--base", str(base))


def test_alpha_is_never_guessed(base: Path, tmp_path: Path) -> None:
    src = pt(tmp_path, {"generator_lora": PEFT})
    refused("of rank 4, has no alpha in its file and no adapter_config.json beside it; state --lora-alpha", src, "--base", str(base))
    stated = flat(tmp_path, halves("diffusion_model.", "lora_down.weight", "lora_up.weight") | alphas(2.0))
    refused("--lora-alpha is 3, but the file says 2 for blocks", stated, "--base", str(base), "--lora-alpha", "3")


@pytest.mark.parametrize("key", ["use_dora", "use_rslora", "alpha_pattern"])
def test_what_is_not_plain_lora_is_refused(key: str, base: Path, tmp_path: Path) -> None:
    src = adapter(tmp_path, halves("base_model.model.", "lora_A.weight", "lora_B.weight"), {"lora_alpha": 8, key: True})
    refused(f"sets {key} to True, which is not plain LoRA", src, "--base", str(base))


def test_a_lora_needs_one_base_and_only_a_lora_does(base: Path, tmp_path: Path) -> None:
    src = flat(tmp_path, svi())
    refused("is a LoRA; state with --base what it was trained on", src)
    refused("isn't there", src, "--base", str(tmp_path / "nowhere"))
    refused("holds no LoRA; leave the option out", base, "--base", str(base))
    refused("--lora-alpha is 4.0, but .* holds no LoRA", base, "--lora-alpha", "4")
    both = pt(tmp_path, {"generator": before("model.", WAN), "generator_lora": PEFT})
    refused("holds its own base; leave --base out", both, "--base", str(base))
