"""LoRA of the teacher, by peft: small matrices learn beside the base model's weights, which stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cf_model.model.denoiser import Denoiser
from cf_model.train.trainer.engine import require_at_least

HALF = re.compile(r"(.+)\.lora_(A|B)\.default\.weight")  # how peft names the two matrices beside a linear layer


@dataclass(frozen=True)
class LoraSpec:
    """W + alpha / rank * B @ A for the linear layers in `targets`. All three null: no LoRA, every weight learns."""

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...] | None  # ends of the names of linear layers, as diffusers has them

    def __post_init__(self) -> None:
        if len({value is None for value in (self.rank, self.alpha, self.targets)}) > 1:
            problem = f"rank is {self.rank}, alpha {self.alpha}, targets {self.targets and list(self.targets)}"
            raise ValueError(f"{problem}; state all three, or none to train every weight")
        if self.rank is not None:
            require_at_least(1, rank=self.rank)
        if self.targets == ():
            raise ValueError("targets is [], so nothing would learn; name linear layers, or set rank, alpha and targets to null")


def attach_lora(model: Denoiser, spec: LoraSpec, seed: int) -> None:
    """Insert the adapters into the model and freeze the rest, in place. B starts at 0, so the model's answers don't change yet.

    `seed` decides A. Raises ValueError where peft is missing, or a target names no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # here, because only a run with LoRA needs peft
    except ImportError:
        way = "install it (requirements/cpu.txt has the version), or set rank, alpha and targets to null"
        raise ValueError(f"teacher.lora.rank is {spec.rank}, but the package peft is not installed; {way}") from None
    assert spec.rank and spec.alpha and spec.targets
    linear = [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in spec.targets:  # peft itself is satisfied where any of the targets is found
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            in_block = sorted({name.split(".", 2)[-1] for name in linear if name.startswith("blocks.")})
            problem = f"teacher.lora.targets has {target}, but no linear layer's name ends so"
            raise ValueError(f"{problem}; in a block there are {', '.join(in_block)}")
    # A is drawn from a generator state of its own: the stage's random numbers do not depend on whether there is a LoRA.
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.transformer)


def merge_lora(state: Mapping[str, Tensor], alpha: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge the adapters into the weights: W + alpha / rank * B @ A, computed in float32 and stored in W's dtype.

    `state` is the state_dict of a transformer with adapters. Returns the merged weights under the names they have without adapters, and
    the adapters' own tensors: A [rank, inputs] and B [outputs, rank] of each layer.
    """
    pairs = {name: tensor for name, tensor in state.items() if HALF.fullmatch(name)}
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if name not in pairs}
    # A is `down`, [rank, inputs]; B is `up`, [outputs, rank].
    for name, down in pairs.items():
        if (half := HALF.fullmatch(name)) and half[2] == "A":
            weight, up = f"{half[1]}.weight", pairs[f"{half[1]}.lora_B.default.weight"]
            update = alpha / len(down) * (up.float() @ down.float())
            merged[weight] = (merged[weight].float() + update).to(merged[weight].dtype)
    return merged, pairs


def save_adapter(adapter: Mapping[str, Tensor], spec: LoraSpec, folder: Path) -> None:
    """Write the adapters' tensors (`merge_lora`) to `folder` in peft's layout, which `cf import-weights` adds to their base model."""
    folder.mkdir()
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in adapter.items()}
    save_file(named, folder / "adapter_model.safetensors")
    # Written here, because peft's own file lists the targets in another order each time, and a rerun must give the same bytes.
    facts = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(spec.targets or ())}
    facts |= {"lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": None, "task_type": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=1) + "\n")
