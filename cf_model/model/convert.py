"""Names and shapes of Wan's weights: the original's (Self-Forcing's too) and diffusers', by rule, for any number of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from .denoiser import ModelSpec

Value = TypeVar("Value")

# original -> diffusers, without `.weight` and `.bias`
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")) for a, b in ATTENTION.items()},
    "norm3": "norm2",  # the affine one before the cross-attention; the two norms without weights are numbered the other way too
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
TO_DIFFUSERS = (OUTSIDE, BLOCK)
TO_ORIGINAL = tuple({value: key for key, value in part.items()} for part in TO_DIFFUSERS)
NAME = re.compile(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?")
ONLY_DIFFUSERS = re.compile(r"condition_embedder|\.attn[12]\.|\.ffn\.net\.|^proj_out|scale_shift_table")

HEAD_DIM = 128  # of every published Wan


def to_diffusers(state: Mapping[str, Value]) -> dict[str, Value]:
    """From the names of original Wan and Self-Forcing, wrappers already stripped. The values are handed through."""
    return _renamed(state, TO_DIFFUSERS, "original Wan")


def to_self_forcing(state: Mapping[str, Value]) -> dict[str, Value]:
    """The other way round; Self-Forcing's files put `model.` before each name."""
    return _renamed(state, TO_ORIGINAL, "diffusers")


def in_diffusers(state: Mapping[str, Value]) -> dict[str, Value]:
    """Under diffusers' names, whichever of the two it came with."""
    return dict(state) if is_diffusers(state) else to_diffusers(state)


def is_diffusers(names: Iterable[str]) -> bool:
    return any(ONLY_DIFFUSERS.search(name) for name in names)


def _renamed(state: Mapping[str, Value], rules: tuple[dict[str, str], ...], of: str) -> dict[str, Value]:
    renamed, unknown = {}, []
    for name, value in state.items():
        match = NAME.fullmatch(name)
        block, stem, kind = match.groups() if match else (None, "", None)
        new = rules[bool(block)].get(stem)
        if new is None:
            unknown.append(name)
        else:
            renamed[f"{block or ''}{new}{kind or ''}"] = value
    if unknown:
        raise ValueError(f"{some(unknown)} is no weight of {of}'s text-to-video transformer; import a checkpoint of Wan2.1-T2V's architecture")
    return renamed


def some(names: Iterable[str]) -> str:
    """The first three, and how many there are."""
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more ({len(first)} in all)" if len(first) > 3 else "")
