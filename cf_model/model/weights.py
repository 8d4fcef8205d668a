"""Weights of a safetensors file, into a module that they fit exactly or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn


def fill(module: nn.Module, file: Path) -> None:
    """Every weight by its name and shape, in the module's own precision; what doesn't fit is named."""
    check_whole(file)
    state, wanted = load_file(file), module.state_dict()
    wrong = [f"has no {name}" for name in sorted(wanted.keys() - state.keys())]
    wrong += [f"has {name}, which {type(module).__name__} has not" for name in sorted(state.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & state.keys()):
        if state[name].shape != wanted[name].shape:
            wrong.append(f"has {name} of {list(state[name].shape)}, not {list(wanted[name].shape)}")
    refuse(file, wrong)
    module.load_state_dict(state)


def refuse(where: Path, wrong: Sequence[str]) -> None:
    """One sentence, if anything is wrong."""
    if wrong:
        more = f" ({len(wrong) - 1} more like this)" if wrong[1:] else ""
        raise ValueError(f"{where} {wrong[0]}{more}; it belongs to other settings than those in the config.json beside it")


def check_whole(file: Path) -> None:
    """Reads only the header, which says how long the file must be."""
    if not file.is_file():
        raise ValueError(f"{file} isn't there, so the folder is not whole; copy it again")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is cut off or no safetensors file ({error}); copy it again") from None
