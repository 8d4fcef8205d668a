"""Transformers on disk: building, saving and loading diffusers' WanTransformer3DModel in its own folder layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from .denoiser import EXACT, Compute, Denoiser
from .sizes import ModelSpec
from .weights import WEIGHTS, fill_weights


def build_transformer(spec: ModelSpec, *, channels: int, text_channels: int, seed: int, compute: Compute = EXACT) -> Denoiser:
    """Build a transformer with random weights. Its head starts at 0, so that the first loss is the spread of the velocities."""
    # diffusers draws weights from torch's global generator, which is left as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=spec.heads,
            attention_head_dim=spec.head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_channels,
            freq_dim=spec.freq,
            ffn_dim=spec.ffn,
            num_layers=spec.layers,
            rope_max_seq_len=spec.positions,
        )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return Denoiser(transformer, compute)


def save_transformer(model: Denoiser, folder: Path) -> None:
    """Write a diffusers folder: config.json and diffusion_pytorch_model.safetensors."""
    # diffusers saves its own rope, not the stand-in that knows the memory
    rope, model.transformer.rope = model.transformer.rope, model.transformer.rope.table
    try:
        model.transformer.save_pretrained(folder, safe_serialization=True)
    finally:
        model.transformer.rope = rope


def load_transformer(folder: Path, compute: Compute = EXACT) -> Denoiser:
    """Load a diffusers folder. A weight that is missing, unknown or of another shape raises a ValueError that names it."""
    if not (folder / "config.json").is_file():
        way = "run the stage that makes it, or `cf import-weights`"
        raise ValueError(f"{folder} holds no config.json, so it is no transformer of diffusers; {way}")
    transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder, local_files_only=True))
    fill_weights(transformer, folder / WEIGHTS)
    return Denoiser(transformer, compute)
