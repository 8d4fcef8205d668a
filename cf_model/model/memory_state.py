"""A memory as nested dictionaries and tensors, so that a checkpoint can hold a long video between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .key_values import KeyValues
from .memory import ContextMemory, LayerMemories, Memory, MemorySpec, ShareKey

# A field of ContextMemory and its key in a checkpoint: the keys are older than the fields' names, and stay.
PART_KEYS = {"sink": "sink", "promoted_frames": "kept", "early": "early", "fast": "fast"}
VALUE_KEYS = {
    "pending": "news",
    "last_mean_key": "last",
    "frame_count": "seen",
    "similarity": "similarity",
    "noisy_passes": "calls",
    "is_promoted": "judged",
    "is_newest_news": "chosen",
    "promoted_count": "promoted",
}


def dump_memory(memory: Memory) -> dict[str, Any]:
    """Return a memory's state for `restore_memory`; its settings and `share_key` are not part of it."""
    if isinstance(memory, LayerMemories):
        return {"layers": [dump_memory(layer) for layer in memory.layers]}
    return {key: getattr(memory, name) for name, key in VALUE_KEYS.items()} | {
        key: [{"index": f.index, "keys": f.keys, "values": f.values} for f in getattr(memory, name)] for name, key in PART_KEYS.items()
    }


def restore_memory(spec: MemorySpec, state: Mapping[str, Any], share_key: ShareKey | None = None) -> Memory:
    """Return the memory that `dump_memory` described, under the settings it was made with."""
    if "layers" in state:
        layers = tuple(restore_memory(spec, layer, share_key) for layer in state["layers"])
        return LayerMemories(spec, layers, share_key)  # type: ignore[arg-type]
    values = {name: tuple(state[key]) if isinstance(state[key], list) else state[key] for name, key in VALUE_KEYS.items()}
    for name, key in PART_KEYS.items():
        values[name] = tuple(KeyValues(f["index"], tuple(f["keys"]), tuple(f["values"])) for f in state[key])
    return ContextMemory(spec, **values, share_key=share_key)  # type: ignore[arg-type]
