"""Names and shapes of Wan's weights, in original Wan (and Self-Forcing) and in diffusers, by rule, for any number of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from cf_model.model.sizes import ModelSpec
from cf_model.model.weights import list_first_names

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
WIDTH = 1536  # of the smallest published model, Wan2.1 1.3B


def to_diffusers(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename weights of original Wan or Self-Forcing, already without wrappers, to diffusers' names; values pass unchanged."""
    return _rename_weights(state, TO_DIFFUSERS, "original Wan")


def to_self_forcing(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename weights from diffusers' names to original Wan's; Self-Forcing's files put `model.` before each."""
    return _rename_weights(state, TO_ORIGINAL, "diffusers")


def ensure_diffusers_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return weights under diffusers' names, whichever of the two layouts they came in."""
    return dict(state) if is_diffusers(state) else to_diffusers(state)


def is_diffusers(names: Iterable[str]) -> bool:
    """Say whether any of these names exists in diffusers' layout only."""
    return any(ONLY_DIFFUSERS.search(name) for name in names)


def _rename_weights(state: Mapping[str, Value], rules: tuple[dict[str, str], ...], of: str) -> dict[str, Value]:
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
        problem = f"{list_first_names(unknown)} is no weight that {of}'s text-to-video transformer has"
        raise ValueError(f"{problem}; use a checkpoint of its architecture")
    return renamed


SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels")


def diffusers_config(spec: ModelSpec, *, channels: int, text_channels: int) -> dict[str, Any]:
    """Return the transformer's sizes as diffusers' config.json states them."""
    return {
        "num_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.head_dim,
        "ffn_dim": spec.ffn,
        "freq_dim": spec.freq,
        "rope_max_seq_len": spec.positions,
        "text_dim": text_channels,
        "in_channels": channels,
        "out_channels": channels,
    }


def translate_original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the config.json of original Wan to diffusers' keys."""
    dim, heads = config.get("dim"), config.get("num_heads")
    per_head = dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads else None
    return {
        "num_layers": config.get("num_layers"),
        "num_attention_heads": heads,
        "attention_head_dim": per_head,
        "ffn_dim": config.get("ffn_dim"),
        "freq_dim": config.get("freq_dim", 256),
        "text_dim": config.get("text_dim", 4096),
        "in_channels": config.get("in_dim"),
        "out_channels": config.get("out_dim"),
        "eps": config.get("eps", 1e-6),
    }


def infer_config(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Read the sizes off the tensors, under diffusers' keys. `heads` must be given where a head is not 128 wide: it leaves no trace."""
    wanted = {
        "patch_embedding.weight": 5,
        "proj_out.weight": 2,
        "blocks.0.ffn.net.0.proj.weight": 2,
        "condition_embedder.time_embedder.linear_1.weight": 2,
        "condition_embedder.text_embedder.linear_1.weight": 2,
    }
    odd = [name for name, rank in wanted.items() if name not in state or state[name].ndim != rank]
    if odd:
        problem = f"{list_first_names(odd)} is missing or of another rank"
        raise ValueError(f"{problem}, so the sizes of the transformer can't be read off its weights")
    patch, head, ffn, time, text = (state[name].shape for name in wanted)
    dim = patch[0]
    stated, heads = heads, heads or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else None)
    if stated is None and dim < WIDTH:
        problem = f"the weights are {dim} wide, narrower than Wan's smallest ({WIDTH}), and do not say how many heads that is"
        raise ValueError(f"{problem}; state their number with --heads")
    if not heads or dim % heads:
        divisor = f"{heads} heads do" if heads else f"heads of {HEAD_DIM} do"
        raise ValueError(f"the weights are {dim} wide, which {divisor} not divide; state their number with --heads")
    return {
        "patch_size": tuple(patch[2:]),
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "ffn_dim": ffn[0],
        "freq_dim": time[1],
        "text_dim": text[1],
        "in_channels": patch[1],
        "out_channels": head[0] // math.prod(patch[2:]),
    }


def build_on_meta(sizes: Mapping[str, Any]) -> Any:
    """Build diffusers' WanTransformer3DModel of these sizes on the meta device, without memory for its weights."""
    wrong = [f"{key} is {sizes.get(key)!r}" for key in SIZES if not isinstance(sizes.get(key), int) or sizes[key] < 1]
    if wrong:
        raise ValueError(f"the config states no usable sizes: {wrong[0]}; it must be a whole number above 0")
    if sizes["in_channels"] != sizes["out_channels"] or sizes.get("image_dim") or sizes.get("added_kv_proj_dim"):
        channels = f"it takes {sizes['in_channels']} channels and gives {sizes['out_channels']}"
        raise ValueError(f"this is an image-to-video transformer ({channels}, image_dim {sizes.get('image_dim')}); use a text-to-video one")
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(dict(sizes))


def expected_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight in diffusers' transformer of these sizes."""
    return {name: tuple(weight.shape) for name, weight in build_on_meta(sizes).state_dict().items()}
