"""Everything a training run needs to go on, in one safetensors file a checkpoint: never pickle, never half a file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

KEEP = 2  # the newest, and the one before in case the newest is damaged


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes `step-XXXXXXXX.safetensors` under a temporary name, then renames it. Older ones beyond two go."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _flatten({name: part.state_dict() for name, part in state.items()}, "", tensors)
    path = folder / f"step-{step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    # one metadata key: the header's order is random from two on
    save_file(tensors, partial, metadata={"state": json.dumps({"step": step, "state": skeleton})})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        old.unlink()
    return path


def restore(folder: Path, state: Mapping[str, Any]) -> int:
    """Loads the newest checkpoint that can be read and returns its step; 0 when there is none."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path.name} can't be read ({error}); using the checkpoint before it", stacklevel=2)
            continue
        loaded = _unflatten(header["state"], tensors)
        for name, part in state.items():
            part.load_state_dict(loaded[name])
        return int(header["step"])
    return 0


def _flatten(value: Any, at: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value with each tensor moved to `tensors` and its name left in place; dictionary keys keep their type."""
    if isinstance(value, torch.Tensor):
        tensors[at] = value.detach().contiguous().clone()
        return {"tensor": at}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten(item, f"{at}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, f"{at}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _unflatten(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind == "list":
        return [_unflatten(item, tensors) for item in content]
    return content
