"""LoRA of any of Wan's trainers (peft, DiffSynth, ComfyUI names), added to the weights it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cf_model.model.weights import list_first_names

from .weight_names import ensure_diffusers_names

# peft writes the adapter's name before `.weight` where a whole model was saved, and leaves it out in an adapter of its own
HALF = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(\.\w+)?\.weight")
ALPHA = re.compile(r"(.+)\.alpha")
# what ComfyUI adds to a weight and to a bias as it is, beside or instead of a pair: lightx2v's LoRAs of Self-Forcing have both
DELTA = re.compile(r"(.+)\.(diff|diff_b)")


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
    pairs = {name: tensor for name, tensor in state.items() if any(part.fullmatch(name) for part in (HALF, ALPHA, DELTA))}
    rest = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if name not in pairs}
    return pairs, rest


def add_lora(
    base: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: LoraScale, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return W + alpha / rank * B @ A + diff, computed in float32 and stored in `dtype` or the base's own, and facts for import.json.

    `base` has diffusers' names. Raises ValueError where the LoRA does not fit the base, or holds values that are not finite.
    """
    if broken := [name for name, tensor in lora.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"the LoRA holds NaN or infinity in {list_first_names(broken)}; its training had failed, or the file is damaged")
    deltas = _name_deltas({name: tensor for name, tensor in lora.items() if DELTA.fullmatch(name)})
    halves, alphas = _pair_matrices({name: tensor for name, tensor in lora.items() if not DELTA.fullmatch(name)})
    odd = [name for name, pair in halves.items() if not _fits_weight(base.get(name), pair)]
    odd += [name for name, delta in deltas.items() if name not in base or base[name].shape != delta.shape]
    if odd:
        problem = f"the LoRA changes {list_first_names(odd)}, which the base lacks or has in another shape"
        raise ValueError(f"{problem}{_compare_sizes(base, halves)}; give the base it was trained on")
    merged, scales = dict(base), set()
    for name, (down, up) in halves.items():
        own = alphas.pop(name, None)
        alpha, origin = scale.choose_alpha(None if own is None else float(own), len(down), name)
        weight = base[name].float() + alpha / len(down) * (up.float() @ down.float())
        merged[name] = weight.to(dtype or base[name].dtype)
        scales.add((len(down), alpha, origin))
    for name, delta in deltas.items():
        merged[name] = (merged[name].float() + delta.float()).to(dtype or base[name].dtype)
    if alphas:
        raise ValueError(f"the LoRA states alpha for {list_first_names(alphas)} without a pair of matrices; the file is incomplete")
    ranks, values, origins = (sorted(set(column)) for column in zip(*scales, strict=True)) if scales else ([], [], [])
    facts: dict[str, Any] = {"pairs": len(halves), "rank": ranks, "alpha": values, "alpha_from": origins}
    facts = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in facts.items()}
    if deltas:
        facts["deltas"] = len(deltas)
    if not any(bool(up.any()) and bool(down.any()) for down, up in halves.values()) and not any(bool(d.any()) for d in deltas.values()):
        facts["changes"] = "nothing: all its products are 0, as before a training"
    return merged, facts


def _name_deltas(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is added as it is under diffusers' names: `.diff` belongs to a weight or a modulation, `.diff_b` to a bias."""
    named = {}
    for name, tensor in deltas.items():
        layer, kind = name.rsplit(".", 1)
        ending = ".bias" if kind == "diff_b" else "" if layer.endswith(("modulation", "scale_shift_table")) else ".weight"
        named[layer + ending] = tensor
    return ensure_diffusers_names(named)


def _compare_sizes(base: Mapping[str, Tensor], halves: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Say the depth and width of LoRA and base where they differ, because then another size of the model is meant."""

    def depth(names: Iterable[str]) -> int:
        return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)

    query = re.compile(r"blocks\.\d+\.attn1\.to_q\.weight")
    width = next((down.shape[-1] for name, (down, _) in halves.items() if query.fullmatch(name)), None)
    other = next((weight.shape[-1] for name, weight in base.items() if query.fullmatch(name)), None)
    said = []
    if depth(halves) > depth(base):
        said.append(f"the LoRA has blocks up to number {depth(halves) - 1}, the base {depth(base)} blocks")
    if width and other and width != other:
        said.append(f"the LoRA is for a width of {width}, the base is {other} wide")
    return f" ({'; '.join(said)})" if said else ""


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
