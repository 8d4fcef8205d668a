"""`cf import-weights` and `cf export`: one small model in every layout that others publish in, there and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tasks.__main__ as cf
from cf_model.folder import describe_origin
from cf_model.model import wan
from cf_model.model.memory import empty_memory
from tasks.commands import export
from tests.checkpoints import (
    FILE,
    HEADS,
    MODEL,
    OTHER,
    OURS,
    WAN,
    before,
    diffusers,
    flat,
    imported,
    original,
    pipeline,
    pt,
    same,
    sharded,
    wrapped,
)
from tests.small import SHAPE, normal, spec

ROOT = Path(__file__).parent.parent

LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[str], dict[str, Any]]] = {
    "diffusers folder": (diffusers, [], {"layout": "diffusers"}),
    "diffusers, sharded": (sharded, [], {"layout": "diffusers"}),
    "diffusers pipeline": (pipeline, [], {"layout": "diffusers"}),
    "diffusers file with its config": (lambda at: diffusers(at) / FILE, [], {"layout": "diffusers"}),
    "original Wan folder": (original, [], {"layout": "original Wan", "model": {"layers": 2, "heads": 2, "head_dim": 12, "ffn": 32}}),
    "original Wan, sharded": (lambda at: original(at, 2), [], {"layout": "original Wan"}),
    "original Wan file": (flat, HEADS, {"layout": "original Wan", "stripped": []}),
    "DiffSynth, merged (SVI, Context Forcing)": (lambda at: flat(at, before("pipe.dit.", WAN)), HEADS, {"stripped": ["dit", "pipe"]}),
    "ComfyUI": (lambda at: flat(at, before("model.diffusion_model.", WAN)), HEADS, {"stripped": ["diffusion_model", "model"]}),
    "Self-Forcing, averaged before raw": (
        lambda at: pt(at, {"generator": before("model.", OTHER), "generator_ema": before("model.", WAN), "critic": OTHER}),
        HEADS,
        {"layout": "Self-Forcing", "container": "generator_ema", "branch": "ema", "branches": ["ema", "raw", "critic"]},
    ),
    "Self-Forcing, raw asked for": (
        lambda at: pt(at, {"generator": before("model.", WAN), "generator_ema": before("model.", OTHER), "step": 600}),
        [*HEADS, "--branch", "raw"],
        {"container": "generator", "branch": "raw", "branches": ["ema", "raw"]},
    ),
    "Self-Forcing, critic asked for (CausVid)": (
        lambda at: pt(at, {"generator": before("model.", OTHER), "critic": before("model.", WAN)}),
        [*HEADS, "--branch", "critic"],
        {"container": "critic", "branch": "critic"},
    ),
    "ode_init.pt, CausVid, Rolling Forcing, Infinity-RoPE's host": (
        lambda at: pt(at, {"generator": before("model.", WAN)}),
        HEADS,
        {"container": "generator", "branch": "raw"},
    ),
    "every wrapper, in the middle too": (
        lambda at: pt(at, {"generator_ema": wrapped(WAN)}),
        HEADS,
        {"stripped": ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "model", "module"]},
    ),
    "a .pt of diffusers' names": (lambda at: pt(at, before("model.", OURS)), HEADS, {"layout": "diffusers", "names": "diffusers"}),
    "a trainer's folder": (lambda at: pt(at, {"generator": before("model.", WAN)}).parent, HEADS, {"container": "generator"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout: str, tmp_path: Path) -> None:
    make, words, found = LAYOUTS[layout]
    (tmp_path / "src").mkdir()
    state, facts = imported(make(tmp_path / "src"), *words)
    assert same(state, OURS)
    assert facts["tensors"] == len(OURS) and facts["parameters"] == sum(t.numel() for t in OURS.values()) and facts["dtype"] == "float32"
    for key, value in found.items():
        assert (facts[key].items() >= value.items()) if isinstance(value, dict) else facts[key] == value, key


def test_what_was_imported_loads_strictly_and_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = pt(tmp_path, {"generator_ema": wrapped(WAN)})
    _, facts = imported(src, *HEADS)
    said = capsys.readouterr().out
    assert "branch ema (generator_ema; there: ema)" in said and f"{len(OURS)} tensors" in said and said.count("\n") == 1
    again = wan.load_transformer(tmp_path / "imported").eval()
    x, sigma, text = normal(2, 3, *SHAPE), torch.tensor([0.3, 0.7]), normal(2, 5, 8, seed=3)
    with torch.no_grad():
        assert torch.equal(again(x, sigma, text), MODEL(x, sigma, text))
        remembered = [model.remember(x, text, empty_memory(spec())) for model in (again, MODEL)]
        assert torch.equal(again(x, sigma, text, remembered[0]), MODEL(x, sigma, text, remembered[1]))
    assert facts["files"] == [{"name": "model.pt", "bytes": src.stat().st_size, "sha256": hashlib.sha256(src.read_bytes()).hexdigest()}]
    assert not list(tmp_path.glob("*.partial"))


def test_dtype_is_as_stored_or_as_asked(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in OURS.items()}
    state, facts = imported(flat(tmp_path, half), *HEADS)
    assert same(state, half) and facts["dtype"] == "bfloat16"
    (tmp_path / "b").mkdir()
    state, facts = imported(flat(tmp_path / "b"), *HEADS, "--dtype", "bfloat16")
    assert same(state, half) and facts["dtype"] == "bfloat16"


@pytest.mark.parametrize(("suffix", "words"), [("safetensors", HEADS), ("pt", HEADS), ("pt", [*HEADS, "--branch", "raw"])])
def test_exported_and_imported_is_the_same(suffix: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"out.{suffix}"
    cf.main(["export", "--to", "self-forcing", "--model", str(diffusers(tmp_path)), "--out", str(out)])
    assert "import it with --heads 2" in capsys.readouterr().out
    held = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    for state in [held] if suffix == "safetensors" else held.values():
        assert same(state, before("" if suffix == "safetensors" else "model.", WAN))
    assert same(imported(out, *words)[0], OURS)


def test_export_overwrites_nothing(tmp_path: Path) -> None:
    model = diffusers(tmp_path)
    with pytest.raises(ValueError, match=r"writes a \.pt or a \.safetensors"):
        cf.main(["export", "--to", "self-forcing", "--model", str(model), "--out", str(tmp_path / "x.bin")])
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match="which is there; name a new file"):
        cf.main(["export", "--to", "self-forcing", "--model", str(model), "--out", str(tmp_path / "x.pt")])
    assert not (tmp_path / "x.pt").stat().st_size


def test_a_card_says_which_stage_made_the_weights_and_what_is_not_a_finished_student() -> None:
    def said(folder: str, system: str = "stage2") -> tuple[str, str]:
        return describe_origin(Path(folder), system, "smoke", 2602)

    finished, licence = said("models/stage2")
    assert finished == "By the stage `stage2` of context-forcing's pipeline, profile `smoke`, seed 2602." and licence == "Apache-2.0"
    between, _ = said("models/stage1")
    assert "By the stage `stage1`" in between and "with the settings of `stage2`" in between
    assert "an intermediate of the pipeline" in between
    assert "which knows only real videos; the finished" in said("models/causal_init", "causal_init")[0]
    assert "(folder winner)" in said("runs/winner")[0]


@pytest.mark.parametrize("stage", ["base", "teacher"])
def test_a_bidirectional_model_is_not_exported_as_a_student(stage: str, tmp_path: Path) -> None:
    model, codec = tmp_path / stage, tmp_path / "codec"
    model.mkdir()
    codec.mkdir()
    (model / "config.json").write_text("{}")
    words = ["--to", "diffusers", "--model", str(model), "--codec", str(codec), "--system", "stage2", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a bidirectional model, which can't be run as stage2; name models/stage2"):
        export.main([*words, "--params", str(ROOT / "profiles/smoke.yaml")])
