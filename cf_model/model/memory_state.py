"""A memory as nested dictionaries and tensors, so that a checkpoint can hold a long video between two steps.

Every tensor has a row for each video of the batch, so that the videos of several ranks and groups can be joined and parted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .key_values import Frames, KeyValues
from .memory import Memory, MemorySpec, empty_memory
from .slow_part import SlowPart

FRAMES = ("sink", "early", "fast")
VALUES = ["last_mean_key", "video_mean_key", "mean_chunks", "frame_count", "similarity", "noisy_passes", "is_promoted"]
VALUES += ["is_newest_news", "promoted_count"]


def dump_memory(memory: Memory) -> dict[str, Any]:
    """Return a memory's state for `restore_memory`; its settings are not part of it."""
    slow = {name: getattr(memory.slow, name) for name in ("order", "index", "count", "turn")}
    slow["candidates"] = _dump_frames(memory.slow.candidates)
    pending = [{"index": index, "news": news} for index, news in memory.pending.items()]
    frames = {name: _dump_frames(getattr(memory, name)) for name in FRAMES}
    return {name: getattr(memory, name) for name in VALUES} | frames | {"pending": pending, "slow": slow}


def restore_memory(spec: MemorySpec, state: Mapping[str, Any]) -> Memory:
    """Return the memory that `dump_memory` described, under the settings it was made with."""
    slow = SlowPart(spec.slow, **state["slow"] | {"candidates": _restore_frames(state["slow"]["candidates"])})
    parts: dict[str, Any] = {name: _restore_frames(state[name]) for name in FRAMES} | {name: state[name] for name in VALUES}
    pending = {item["index"]: item["news"] for item in state["pending"]}
    return replace(empty_memory(spec), slow=slow, pending=pending, **parts)


def _dump_frames(frames: Frames) -> list[dict[str, Any]]:
    return [{"index": frame.index, "keys": frame.keys, "values": frame.values} for frame in frames]


def _restore_frames(state: list[dict[str, Any]]) -> Frames:
    return tuple(KeyValues(frame["index"], tuple(frame["keys"]), tuple(frame["values"])) for frame in state)
