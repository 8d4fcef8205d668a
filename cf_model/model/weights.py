"""Weights from a safetensors file into a module that they fit exactly; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for them
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def choose_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU that computes in it and float32 elsewhere, because most CPUs emulate it at a twentieth of the speed."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def fill_weights(module: nn.Module, file: Path) -> None:
    """Load every weight of a file by its name, in the module's own precision; a ValueError names what does not fit."""
    # checked first, because a file that is cut off fails in ways that name neither file nor reason
    check_safetensors_header(file)
    state = load_file(file)
    try:
        check_weights(state, {name: tuple(weight.shape) for name, weight in module.state_dict().items()})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    module.load_state_dict(state)


def check_safetensors_header(file: Path) -> None:
    """Raise ValueError for a file that is absent or cut off; reads only the header, which says how long the file must be."""
    if not file.is_file():
        raise ValueError(f"{file} isn't there, so the folder is not whole; copy it again")
    try:
        # opening compares the file's length with its header
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is cut off or no safetensors file ({error}); copy it again") from None


def check_weights(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming what is wrong, unless `state` has exactly these names and shapes, in floating point."""
    faults = []
    if missing := shapes.keys() - state.keys():
        faults.append(f"lacks {list_first_names(missing)}")
    if unknown := state.keys() - shapes.keys():
        faults.append(f"holds {list_first_names(unknown)}, which it should not")
    both = [name for name in shapes if name in state]
    if misshapen := [f"{name} as {list(state[name].shape)} for {list(shapes[name])}" for name in both if state[name].shape != shapes[name]]:
        faults.append(f"has the wrong shape for {list_first_names(misshapen)}")
    if other := [f"{name} as {str(t.dtype)[6:]}" for name, t in state.items() if t.dtype not in FLOATS]:
        faults.append(f"stores {list_first_names(other)}, which is quantised")
    if faults:
        raise ValueError(f"it {', and '.join(faults)}; it must hold exactly the weights that its config names")


def list_first_names(names: Iterable[str]) -> str:
    """Return the first three names, and how many there are."""
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more ({len(first)} in all)" if len(first) > 3 else "")
