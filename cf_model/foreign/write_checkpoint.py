"""A transformer of ours as a file under the names that Self-Forcing's code reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .import_checkpoint import read_weights
from .weight_names import to_self_forcing


def write_self_forcing(model: Path, out: Path, *, flat: bool) -> tuple[int, dict[str, Any]]:
    """Write a model's weights under Self-Forcing's names; return how many tensors they are, and the model's config.

    `flat`: as safetensors. Otherwise a .pt with `model.` before each name, under generator and generator_ema.
    """
    weights = read_weights(model)
    state = to_self_forcing(weights.state)
    if flat:
        save_file(state, out, metadata={"format": "pt"})
    else:
        branch = {f"model.{name}": tensor for name, tensor in state.items()}
        torch.save({"generator": branch, "generator_ema": branch}, out)
    return len(state), dict(weights.config)
