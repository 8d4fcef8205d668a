"""Whether a folder is a whole transformer in diffusers' layout, by its config and the header of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from cf_model.model.weights import WEIGHTS, check_safetensors_header, check_weights

CLASS = "WanTransformer3DModel"
KINDS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


def check_transformer(folder: Path) -> dict[str, int]:
    """Return in_channels and text_dim of a transformer's folder; of the weights only names, shapes and length are read.

    Raises ValueError for anything else, and for weights that are not exactly those that the config names.
    """
    file, way = folder / "config.json", "name a folder that a stage or `cf import-weights` wrote"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no transformer of diffusers; {way}")
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: it names no class; {way}") from None
    if kind != CLASS:
        raise ValueError(f"{file} is of class {kind}, and must be of {CLASS}; {way}")
    config = WanTransformer3DModel.load_config(folder, local_files_only=True)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in WanTransformer3DModel.from_config(config).state_dict().items()}
    check_safetensors_header(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        state = {
            name: torch.empty(part.get_shape(), dtype=KINDS.get(part.get_dtype(), torch.int8), device="meta")
            for name, part in slices.items()
        }
    try:
        check_weights(state, shapes)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    return {"in_channels": config["in_channels"], "text_dim": config["text_dim"]}
