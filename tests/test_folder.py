"""A model folder: written whole or not at all, read strictly, and any other layout recognised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cf_model.codec.wan_codec import load_wan_codec
from cf_model.model import wan
from cf_model.model.flow import BatchGenerator
from cf_model.model.rollout import stream
from cf_model.model.sizes import ModelSpec
from cf_model.pipeline import ContextForcingPipeline
from cf_model.text.encoder import build_text_encoder
from tests import pretrained
from tests.folders import pipeline, recipe

WORDS = "a red disc over hills"


@pytest.fixture(scope="module")
def pipe() -> ContextForcingPipeline:
    return pipeline()


def test_a_saved_model_makes_the_same_video_and_diffusers_reads_its_transformer(pipe: ContextForcingPipeline, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    pipe.save_pretrained(tmp_path / "m")
    again = ContextForcingPipeline.from_pretrained(tmp_path / "m")
    assert again.recipe == pipe.recipe
    assert (again(WORDS, seconds=2) == pipe(WORDS, seconds=2)).all()
    home, ours = tmp_path / "m/transformer", pipe.denoiser.transformer.state_dict()
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(home))  # its from_pretrained wants accelerate
    theirs.load_state_dict(load_file(home / "diffusion_pytorch_model.safetensors"), strict=True)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())
    files = {str(file.relative_to(tmp_path / "m")) for file in (tmp_path / "m").rglob("*") if file.is_file()}
    assert {Path(file).suffix for file in files} == {".json", ".safetensors", ".md"}
    card = (tmp_path / "m/README.md").read_text()
    assert "license: apache-2.0" in card and "By chance." in card and "cf video --model m" in card
    with pytest.raises(ValueError, match="m is already there"):
        pipe.save_pretrained(tmp_path / "m")


def test_a_failed_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    monkeypatch.setattr("cf_model.folder.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def edited(folder: Path, change: dict[str, object]) -> None:
    file = folder / "context_forcing.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_a_damaged_folder_is_named(pipe: ContextForcingPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "m")
    memory = json.loads((tmp_path / "m/context_forcing.json").read_text())["memory"]
    for change, said in (
        ({"memory": memory | {"promote": "often"}}, "context_forcing.json: memory.promote is 'often'; it must be similarity, uniform"),
        ({"memory": memory | {"sink": 3.5}}, "memory.sink is 3.5; it must be int"),
        ({"memory": memory | {"interval": 0}}, "memory.interval is 0 and begin 1"),
        ({"memory": {**memory, "tua": 1}}, "memory.tua is not a setting; known are sink, slow"),
        ({"memory": {name: memory[name] for name in memory if name != "keep"}}, "memory.keep is missing"),
        ({"memory": memory | {"slow": 300}}, "sink [+] slow [+] fast is 309, but the RoPE table has 256"),
        ({"memory": memory, "levels": [0.5, 1.0]}, r"levels is \[0.5, 1.0\]; they fall"),
        ({"levels": [1.0, 0.5], "height": 40}, "height, width, fps and chunk are 40"),
    ):
        edited(tmp_path / "m", change)
        with pytest.raises(ValueError, match=said) as refused:
            ContextForcingPipeline.from_pretrained(tmp_path / "m")
        assert "\n" not in str(refused.value)
    weights = tmp_path / "m/transformer/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "proj_out.bias"}, weights)
    edited(tmp_path / "m", {"height": 32})
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: it lacks proj_out\.bias"):
        ContextForcingPipeline.from_pretrained(tmp_path / "m")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is cut off"):
        ContextForcingPipeline.from_pretrained(tmp_path / "m")
    (tmp_path / "m/context_forcing.json").unlink()
    with pytest.raises(ValueError, match=r"m lacks context_forcing.json; .*cf export --to diffusers"):
        ContextForcingPipeline.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no model_index.json, so it is no model folder; `cf export --to diffusers --model models/stage2 --out DIR` makes one"),
        ({"config.json": "{}"}, "is a transformer alone, as the stages write it; `cf export --to diffusers --model .*/m --out DIR`"),
        ({"codec.json": "{}"}, "is a codec alone; `cf export"),
        ({"model_index.json": '{"_class_name": "WanPipeline"}'}, "is a diffusers WanPipeline .*`cf import-weights .*/m --out WEIGHTS`"),
        ({"self_forcing_dmd.pt": ""}, "holds self_forcing_dmd.pt, weights in a layout of Self-Forcing or original Wan; `cf import-weights"),
        ({"model_index.json": "[]"}, "model_index.json is not a JSON object"),
    ],
)
def test_another_layout_is_recognised(files: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name, text in files.items():
        (tmp_path / "m" / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        ContextForcingPipeline.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="nothing is no folder; `cf export"):
        ContextForcingPipeline.from_pretrained(tmp_path / "nothing")


def test_a_model_of_wans_parts_is_a_diffusers_pipeline_with_a_recipe(tmp_path: Path) -> None:
    """AutoencoderKLWan and UMT5 in small: the folders are those of a WanPipeline, and a loaded one makes the same video."""
    wans = pretrained.save(tmp_path / "wan")
    sizes = ModelSpec(layers=1, heads=2, head_dim=12, ffn=32, freq=16, positions=64)
    student = wan.build_transformer(sizes, channels=4, text_channels=pretrained.WIDTH, seed=0)
    torch.nn.init.normal_(student.transformer.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    text = build_text_encoder("umt5", wans, 12, pretrained.WIDTH)
    pipe = ContextForcingPipeline(student, load_wan_codec(wans), text, recipe(promote="uniform"))
    pipe.save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m/model_index.json").read_text())
    theirs = {"transformer", "vae", "text_encoder", "tokenizer"}
    assert {name for name in index if not name.startswith("_")} == theirs
    assert all((tmp_path / "m" / name).is_dir() for name in theirs)
    again = ContextForcingPipeline.from_pretrained(tmp_path / "m")
    made = pipe("a red disc", seconds=2)
    assert (again("a red disc", seconds=2) == made).all() and (pipe("a blue disc", seconds=2) != made).any()
    clip = made[:21]
    encoded = pipe.codec.encode(torch.from_numpy(clip)[None])
    text = pipe.text.encode(["a red disc"])
    memory = student.remember_clip(encoded, text, pipe.recipe.memory, chunk=3)
    rng, shape = BatchGenerator([(0,)]), (4, 4, 4)
    new = next(stream(student, text, shape, sigmas=pipe.recipe.flow.shift_levels(pipe.recipe.levels), chunk=3, memory=memory, rng=rng))
    whole = pipe.codec.decode(torch.cat([encoded, new], dim=1))[0, 21:].numpy()
    assert (pipe("a red disc", seconds=12 / 16, continue_from=clip) == whole).all()
    with pytest.raises(ValueError, match="has 30 words, which are 31 tokens, but the text encoder reads 12"):
        pipe("a " * 30)
