"""LoRA of any of Wan's trainers (peft, DiffSynth, ComfyUI names), added to the weights it was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cf_model.model.weights import list_first_names

from .weight_names import ensure_diffusers_names

# peft writes the adapter's name before `.weight` where a whole model was saved, and leaves it out in an adapter of its own
HALF = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight")
ALPHA = re.compile(r"(.+)\.alpha")


@dataclass(frozen=True)
class LoraScale:
    """Places that may state alpha of W + alpha / rank * B @ A; `choose_alpha` takes the first, and refuses two that differ."""

    stated: float | None  # --lora-alpha
    adapter: Mapping[str, Any] | None  # peft's adapter_config.json
    rank: bool  # DiffSynth's files have no alpha: its loader adds B @ A as it is

    def choose_alpha(self, own: float | None, rank: int, name: str) -> tuple[float, str]:
        """Return alpha of one weight and where it is stated; `own` is what the LoRA's file says of that weight."""
        alpha, origin = own, "the file"
        if own is None and self.adapter is not None:
            alpha, origin = _read_adapter_alpha(self.adapter), "adapter_config.json"
        if alpha is not None:
            if self.stated not in (None, alpha):
                raise ValueError(f"--lora-alpha is {self.stated:g}, but {origin} says {alpha:g} for {name}; leave the option out")
            return alpha, origin
        if self.stated is not None:
            return self.stated, "--lora-alpha"
        if self.rank:
            return float(rank), "DiffSynth's rule, alpha = rank"
        raise ValueError(f"the LoRA, of rank {rank}, has no alpha in its file and no adapter_config.json beside it; state --lora-alpha")


def _read_adapter_alpha(adapter: Mapping[str, Any]) -> float | None:
    """Return alpha of peft's adapter_config.json; raises ValueError where it states anything but plain LoRA."""
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if adapter.get(key):
            raise ValueError(f"adapter_config.json sets {key} to {adapter[key]!r}, which is not plain LoRA; merge it with peft first")
    alpha = adapter.get("lora_alpha")
    return None if alpha is None else float(alpha)


def split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the LoRA's tensors, and all others under the names that they have without a LoRA."""
    pairs = {name: tensor for name, tensor in state.items() if HALF.fullmatch(name) or ALPHA.fullmatch(name)}
    rest = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if name not in pairs}
    return pairs, rest


def add_lora(
    base: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: LoraScale, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return W + alpha / rank * B @ A, computed in float32 and stored in `dtype` or the base's own, and facts for import.json.

    `base` has diffusers' names. Raises ValueError where the LoRA does not fit the base.
    """
    halves, alphas = _pair_matrices(lora)
    odd = [name for name, pair in halves.items() if not _fits_weight(base.get(name), pair)]
    if odd:
        problem = f"the LoRA changes {list_first_names(odd)}, which the base lacks or has in another shape"
        raise ValueError(f"{problem}; give the base it was trained on")
    merged, scales = dict(base), set()
    for name, (down, up) in halves.items():
        own = alphas.pop(name, None)
        alpha, origin = scale.choose_alpha(None if own is None else float(own), len(down), name)
        weight = base[name].float() + alpha / len(down) * (up.float() @ down.float())
        merged[name] = weight.to(dtype or base[name].dtype)
        scales.add((len(down), alpha, origin))
    if alphas:
        raise ValueError(f"the LoRA states alpha for {list_first_names(alphas)} without a pair of matrices; the file is incomplete")
    ranks, values, origins = (sorted(set(column)) for column in zip(*scales, strict=True))
    facts = {"pairs": len(halves), "rank": ranks, "alpha": values, "alpha_from": origins}
    return merged, {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in facts.items()}


def _pair_matrices(lora: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return weight -> (A, B) and weight -> alpha, under diffusers' names."""
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "alpha": {}}
    for name, tensor in lora.items():
        half = HALF.fullmatch(name)
        side = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}[half[2]] if half else "alpha"
        weight = f"{half[1] if half else name.removesuffix('.alpha')}.weight"
        if weight in parts[side]:
            raise ValueError(f"{weight} has two LoRA pairs in one file; keep one adapter")
        parts[side][weight] = tensor
    if unpaired := parts["A"].keys() ^ parts["B"].keys():
        raise ValueError(f"the LoRA has only one of two matrices for {list_first_names(unpaired)}; the file is incomplete")
    down, up, alpha = (ensure_diffusers_names(part) for part in parts.values())
    return {name: (down[name], up[name]) for name in down}, alpha


def _fits_weight(weight: Tensor | None, pair: tuple[Tensor, Tensor]) -> bool:
    """Say whether B @ A has the weight's shape: A [rank, in], B [out, rank], W [out, in]."""
    down, up = pair
    if weight is None or weight.ndim != 2 or down.ndim != 2 or up.ndim != 2:
        return False
    return down.shape[0] == up.shape[1] and (up.shape[0], down.shape[1]) == tuple(weight.shape)
