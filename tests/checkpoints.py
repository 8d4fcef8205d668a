"""One small model as others would publish it, for the tests of `cf import-weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tasks.__main__ as cf
from cf_model.foreign import weight_names
from cf_model.model import wan
from tests.small import denoiser

State = dict[str, Tensor]
FILE = "diffusion_pytorch_model.safetensors"
HEADS = ["--heads", "2"]  # small heads are 12 wide, Wan's 128
MODEL = denoiser()
OURS: State = dict(MODEL.transformer.state_dict())
WAN: State = weight_names.to_self_forcing(OURS)
OTHER: State = {name: tensor + 1 for name, tensor in WAN.items()}
ORIGINAL = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    **{"dim": 24, "num_heads": 2, "ffn_dim": 32, "freq_dim": 16, "in_dim": 4, "out_dim": 4, "num_layers": 2, "text_dim": 8, "eps": 1e-6},
}


def imported(src: Path, *words: str) -> tuple[State, dict[str, Any]]:
    out = src.parent / "imported"
    cf.main(["import-weights", str(src), "--out", str(out), *words])
    return load_file(out / FILE), json.loads((out / "import.json").read_text())


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def before(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def wrapped(state: State) -> State:
    """As FSDP, activation checkpointing, compile and DDP leave them, all at once."""
    parts = [name.split(".") for name in state]
    inner = ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
    names = [".".join([*part[:2], *inner, *part[2:]] if part[0] == "blocks" else part) for part in parts]
    return before("module._orig_mod.model._fsdp_wrapped_module.", dict(zip(names, state.values(), strict=True)))


def folder(at: Path, state: State, config: dict[str, Any], shards: int = 1) -> Path:
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    if shards == 1:
        save_file(state, at / FILE)
        return at
    files = [f"diffusion_pytorch_model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    for n, file in enumerate(files):
        save_file({name: state[name] for name in names[n::shards]}, at / file)
    index = {"metadata": {}, "weight_map": {name: files[n % shards] for n, name in enumerate(names)}}
    (at / f"{FILE}.index.json").write_text(json.dumps(index))
    return at


def diffusers(at: Path) -> Path:
    wan.save_transformer(MODEL, at / "wan")
    return at / "wan"


def sharded(at: Path) -> Path:
    return folder(at / "wan", OURS, json.loads((diffusers(at / "x") / "config.json").read_text()), shards=3)


def pipeline(at: Path) -> Path:
    wan.save_transformer(MODEL, at / "wan" / "transformer")
    (at / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return at / "wan"


def original(at: Path, shards: int = 1) -> Path:
    made = folder(at / "Wan2.1", WAN, ORIGINAL, shards)
    (made / "Wan2.1_VAE.pth").write_bytes(b"not read")
    return made


def flat(at: Path, state: State = WAN) -> Path:
    save_file(state, at / "wan.safetensors")
    return at / "wan.safetensors"


def pt(at: Path, tree: object) -> Path:
    torch.save(tree, at / "model.pt")
    return at / "model.pt"
