"""LoRA of the teacher, by peft: small matrices beside the base model's weights learn, the weights stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cf_model.model.denoiser import Denoiser
from cf_model.train.trainer.engine import require_at_least


@dataclass(frozen=True)
class LoraSpec:
    """W + alpha / rank * B @ A. All three null: no LoRA, every weight learns."""

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...] | None  # ends of the names of linear layers, as diffusers has them

    def __post_init__(self) -> None:
        if len({value is None for value in (self.rank, self.alpha, self.targets)}) > 1:
            stated = f"rank is {self.rank}, alpha {self.alpha}, targets {self.targets and list(self.targets)}"
            raise ValueError(f"{stated}; state all three, or none to train every weight")
        if self.rank is not None:
            require_at_least(1, rank=self.rank)
        if self.targets == ():
            raise ValueError("targets is [], so nothing would learn; name linear layers, or set rank, alpha and targets to null")


def attach_lora(model: Denoiser, spec: LoraSpec, seed: int) -> None:
    """Puts the adapters in and freezes the rest, in place. B starts at 0: the model's answers don't change yet."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # here: only a run that asks for LoRA needs it
    except ImportError:
        way = "install it (requirements/cpu.txt has the version), or set rank, alpha and targets to null"
        raise ValueError(f"teacher.lora.rank is {spec.rank}, but the package peft is not installed; {way}") from None
    assert spec.rank and spec.alpha and spec.targets
    linear = [name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in spec.targets:  # peft itself is content when one of them is there
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.split(".", 2)[-1] for name in linear if name.startswith("blocks.")})
            stated = f"teacher.lora.targets has {target}, but no linear layer's name ends so"
            raise ValueError(f"{stated}; in a block there are {', '.join(known)}")
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.transformer)
