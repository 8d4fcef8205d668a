"""Checkpoints of Wan's text-to-video transformer as others publish them, read into diffusers' layout.

The layout is read off the file: container key of a `.pt`, wrappers around the names, names, shapes. So CausVid,
Self-Forcing, Rolling Forcing, LongLive's base and the hosts of Infinity-RoPE are a single case, and SVI's and Context
Forcing's LoRA and merged files another. Nothing is loaded in part: a weight that is missing, unknown or misshapen is
refused by name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cf_model.model.weights import WEIGHTS, check_weights, list_first_names

from . import lora
from .source_files import Branch, SourceWeights, open_source
from .weight_names import HEAD_DIM, build_on_meta, ensure_diffusers_names, expected_shapes, infer_config


@dataclass(frozen=True)
class ImportedWeights:
    """Complete transformer under diffusers' names, and the facts that import.json reports."""

    state: dict[str, Tensor]
    config: dict[str, Any]  # of diffusers
    facts: dict[str, Any]


def import_transformer(
    src: Path,
    out: Path,
    *,
    base: Path | None = None,
    branch: Branch | None = None,
    dtype: torch.dtype | None = None,
    heads: int | None = None,
    lora_alpha: float | None = None,
) -> dict[str, Any]:
    """Write a diffusers folder that `wan.load_transformer` opens, with import.json beside the weights; return what that says."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty; name a new folder")
    weights = read_weights(src, base=base, branch=branch, dtype=dtype, heads=heads, lora_alpha=lora_alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    partial.chmod(0o755)  # mkdtemp lets nobody but the owner read
    try:
        build_on_meta(weights.config).save_config(partial)
        save_file({name: tensor.contiguous() for name, tensor in weights.state.items()}, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / "import.json").write_text(json.dumps(weights.facts, indent=2) + "\n")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return weights.facts


def read_weights(
    src: Path,
    *,
    base: Path | None = None,
    branch: Branch | None = None,
    dtype: torch.dtype | None = None,
    heads: int | None = None,
    lora_alpha: float | None = None,
) -> ImportedWeights:
    """Detect the layout, strip wrappers, rename, add a LoRA to its base, and check every name and shape.

    Without `branch`: generator_ema if the file has it, else generator. Without `dtype`: as stored. `heads` is needed only
    where no config says it and heads are not 128 wide.
    """
    source = open_source(src, branch)
    pairs, rest = lora.split_lora(source.state)
    if not pairs:
        for name, value in (("--base", base), ("--lora-alpha", lora_alpha)):
            if value is not None:
                raise ValueError(f"{name} is {value}, but {src} holds no LoRA; leave the option out")
        state, config = _check_transformer(source, rest, heads)
        facts: dict[str, Any] = {}
    else:
        below = _read_base(source, base, rest, heads)
        scale = lora.LoraScale(lora_alpha, source.adapter, rank={"pipe", "dit"} <= set(source.stripped))
        try:
            state, lora_facts = lora.add_lora(below.state, pairs, scale, dtype)
        except ValueError as error:
            raise ValueError(f"{src}: {error}") from None
        config, facts = below.config, {"layout": "LoRA", "lora": lora_facts, "base": below.facts}
    if heads is None and source.config is None and base is None:
        facts["assumed"] = f"heads are {HEAD_DIM} wide, as in every published Wan; --heads states another number"
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in sorted(state.items())}
    if broken := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{src} holds NaN or infinity in {list_first_names(broken)}; its training had failed, or the file is damaged")
    return ImportedWeights(state, config, source.facts() | facts | _describe_weights(state, config))


def _check_transformer(source: SourceWeights, weights: Mapping[str, Tensor], heads: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a complete transformer under diffusers' names, and its config; a ValueError names what is missing or misshapen."""
    try:
        state = ensure_diffusers_names(weights)
        config = source.config or infer_config(state, heads)
        check_weights(state, expected_shapes(config))
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    if heads not in (None, config["num_attention_heads"]):
        raise ValueError(f"--heads is {heads}, but {source.path}'s config says {config['num_attention_heads']}; leave the option out")
    return state, config


def _read_base(source: SourceWeights, base: Path | None, rest: Mapping[str, Tensor], heads: int | None) -> ImportedWeights:
    """Return the weights that a LoRA is added to: another checkpoint, or the transformer in the same file."""
    is_complete = "patch_embedding.weight" in rest
    if rest and not is_complete:
        raise ValueError(f"{source.path} holds {list_first_names(rest)} beside LoRA matrices, but no whole transformer; use a plain LoRA")
    if is_complete == (base is not None):
        way = "holds its own base; leave --base out" if is_complete else "is a LoRA; state with --base what it was trained on"
        raise ValueError(f"{source.path} {way}")
    if base is not None:
        return read_weights(base, heads=heads)
    return ImportedWeights(*_check_transformer(source, rest, heads), {"source": "the same file"})


def _describe_weights(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return counts, precision and sizes for import.json."""
    model = {
        "layers": config["num_layers"],
        "heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "ffn": config["ffn_dim"],
        "freq": config["freq_dim"],
        "positions": config.get("rope_max_seq_len", 1024),
    }
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    return {
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "model": model,
        "channels": config["in_channels"],
        "text_channels": config["text_dim"],
    }


def describe_import(facts: dict[str, Any]) -> str:
    """Describe an import in one line, from the facts that import.json has."""
    parts = [facts["layout"]]
    if "branch" in facts:
        parts.append(f"branch {facts['branch']} ({facts['container']}; there: {', '.join(facts['branches'])})")
    if facts["stripped"]:
        parts.append(f"without {', '.join(facts['stripped'])}")
    if "lora" in facts:
        lora = facts["lora"]
        if lora["pairs"]:
            parts.append(f"{lora['pairs']} pairs of rank {lora['rank']}, alpha {lora['alpha']} by {lora['alpha_from']}")
        parts += [f"{lora['deltas']} weights and biases added as they are"] if "deltas" in lora else []
        parts += [f"on {facts['base']['source']}"]
        parts += [f"it changes {lora['changes']}"] if "changes" in lora else []
    parts += [f"assumed: {facts['assumed']}"] if "assumed" in facts else []
    dtype = facts["dtype"] if isinstance(facts["dtype"], str) else " and ".join(facts["dtype"])
    parts.append(f"{facts['tensors']} tensors, {facts['parameters']:,} parameters, {dtype}")
    return "; ".join(parts)
