"""What bfloat16 products and checkpoints need of diffusers' layers: float32 time embedding, copies of weights, blocks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TimeLinear(nn.Linear):
    """Linear layer of the time embedding: float32 under autocast too, as in Wan's code, because bfloat16 has steps of 4 near 1000 σ."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def prepare_layers(transformer: Any, *, checkpointing: bool) -> None:
    """Change a diffusers transformer's layers in place as this file says; its weights and their names stay."""
    times = transformer.condition_embedder
    for linear in (times.time_embedder.linear_1, times.time_embedder.linear_2, times.time_proj):
        linear.__class__ = TimeLinear
    if checkpointing:
        transformer.enable_gradient_checkpointing(checkpoint_block)


def checkpoint_block(block: Any, *inputs: Any) -> Tensor:
    """Run a block whose activations are computed again in the backward pass (diffusers' `gradient_checkpointing_func`).

    `inputs` end with the pass's view. Keys and values that are wanted leave the checkpoint as its results, not by the view: what a
    checkpointed function hands out in another way it would hand out again in the backward pass.
    """
    *tensors, view = inputs
    layer = block.attn1.processor.layer

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = replace(view, captured=None if view.captured is None else {})
        hidden = block(*tensors, own)
        return (hidden, *own.captured[layer]) if own.captured else (hidden,)

    hidden, *captured = checkpoint(run, *tensors, use_reentrant=False)
    if captured:
        view.captured[layer] = (captured[0], captured[1])
    return hidden


class WeightCopies:
    """bfloat16 copies of a transformer's weights, so that passes without gradient need not cast them, each time anew, as autocast does.

    Copied are the weights of products, which autocast would cast, and those of norms over tokens, because torch has a norm of bfloat16
    in one operation only where the weight is of the same type (`normalize_tokens`).
    """

    def __init__(self, transformer: Any, prompts: MutableMapping[Tensor, Any], *, wanted: bool) -> None:
        self.transformer, self.prompts, self.wanted = transformer, prompts, wanted
        self.copies = dict[str, Tensor]()  # empty: not made since the weights changed
        self.version = object()  # another one whenever the weights have changed

    def read(self) -> dict[str, Tensor]:
        """Return the copies by name, made at the first call after a change of the weights.

        {} with gradients, which are those of the weights themselves, and where ZeRO 3 has split the weights.
        """
        if not self.wanted or torch.is_grad_enabled():
            return {}
        if not self.copies:
            weights = dict(self._list_wide())
            if not any(hasattr(weight, "ds_id") for weight in weights.values()):
                self.copies = {name: weight.detach().to(torch.bfloat16) for name, weight in weights.items()}
        return self.copies

    def forget(self) -> None:
        """Let go of the copies and of prompts that were computed with the weights, because the weights have changed."""
        self.copies, self.version = {}, object()
        self.prompts.clear()

    def narrow_originals(self) -> None:
        """Turn the weights themselves to bfloat16, where nothing will train them."""
        for _, weight in self._list_wide() if self.wanted else ():
            weight.data = weight.data.to(torch.bfloat16)
        self.forget()

    def _list_wide(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and float32 weights of products, but for the time embedding's, and of norms."""
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d | nn.RMSNorm | nn.LayerNorm) and not isinstance(module, TimeLinear):
                for part, weight in module.named_parameters(name, recurse=False):
                    if weight.dtype == torch.float32:
                        yield part, weight


def forget_copies(model: nn.Module) -> None:
    """Let go of a model's bfloat16 copies after an update of its weights; a model without copies is left alone."""
    if isinstance(copies := getattr(model, "copies", None), WeightCopies):
        copies.forget()


def check_fp8(dtype: str) -> None:
    """Raise ValueError where products can't be computed in 8 bits: without torchao, in float32, or on a GPU that has none."""
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("fp8 needs the package torchao, which is not installed; `pip install torchao`, or leave fp8 out")
    if dtype != "bfloat16":
        raise ValueError(f"fp8 is wanted with dtype {dtype}, but its products start from bfloat16; use dtype: bfloat16, or leave fp8 out")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise ValueError("fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and there is none; leave fp8 out")


def check_onednn(dtype: str) -> None:
    """Raise ValueError where `onednn` would change nothing, because a CPU's products in bfloat16 are oneDNN's anyway."""
    if dtype != "float32":
        raise ValueError(f"onednn is wanted with dtype {dtype}, but is for products in float32; use dtype: float32, or leave onednn out")


def narrow_to_fp8(transformer: Any) -> None:
    """Turn the products of all blocks to float8, a scale for each row, activations as they come (torchao); what is left stays.

    A prompt's first layers, the time embedding and the head are small, and errors there would reach everything.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    # rowwise: each token and each output channel has a scale of its own
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    for block in transformer.blocks:
        quantize_(block, config)
        block.ffn.net[0].is_fused = False  # which would read the weights as if they were in bfloat16
