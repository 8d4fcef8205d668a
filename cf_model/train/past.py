"""Videos that outlive a step, because training continues them from step to step (`persist: stream`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cf_model.model.memory import MemorySpec
from cf_model.model.memory_state import dump_memory, restore_memory
from cf_model.model.rollout import Rollout
from cf_model.train.trainer.ranks import BatchRandom, gather_rows


class RolloutStream:
    """The video that one group of the batch continues: its final length in latent frames, its prompt, and its newest part."""

    def __init__(self) -> None:
        self.frames, self.text = 0, torch.empty(0)
        self.newest: Rollout | None = None


class RolloutStreams:
    """The videos that `persist: stream` continues, one of each group. A checkpoint holds those of the whole batch, from all ranks."""

    def __init__(self, spec: MemorySpec, random: BatchRandom, device: torch.device) -> None:
        self.spec, self.random, self.device = spec, random, device
        self.groups = [RolloutStream() for _ in range(random.count)]

    def state_dict(self) -> dict[str, Any]:
        """Return the videos of the whole batch. Every rank must call, because the rows are gathered."""
        if not self.groups[0].newest:
            return {}
        # Groups were computed apart; a checkpoint holds one tensor for the batch, in the order of rows that `own_rows` cuts again.
        parts = [
            {"text": stream.text, "video": stream.newest.video, "memory": dump_memory(stream.newest.memory)}
            for stream in self.groups
            if stream.newest
        ]
        batch = _map_batch_tensors(lambda *groups: torch.cat([gather_rows(group) for group in groups]), *parts)
        return {"frames": self.groups[0].frames, **batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each group its rows of the batch, whatever the number of ranks and groups that wrote them."""
        self.groups = [RolloutStream() for _ in self.groups]
        if not state:
            return
        # `groups` makes `own_rows` answer for each group in turn.
        for group in self.random.groups(0):
            part, stream = _map_batch_tensors(lambda rows: self.random.rng.own_rows(rows).contiguous(), state), self.groups[group]
            memory = restore_memory(self.spec, _move_to_device(part["memory"], self.device))
            stream.frames, stream.text = part["frames"], part["text"]
            # Only the video and the memory are needed to continue it: window, target chunks and exits belong to a past step.
            stream.newest = Rollout(part["video"], slice(0), (), (), memory, (), None)


def _map_batch_tensors(change: Callable[..., Tensor], *values: Any) -> Any:
    """Apply `change` to the tensors in nested dictionaries and lists, `values`, which all have the same keys.

    Every tensor has a row for each video of the batch; anything else is the same in all `values` and is copied.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _map_batch_tensors(change, *(value[key] for value in values)) for key in first}
    if isinstance(first, list | tuple):
        return [_map_batch_tensors(change, *items) for items in zip(*values, strict=True)]
    return change(*values) if isinstance(first, Tensor) else first


def _move_to_device(value: Any, device: torch.device) -> Any:
    """Copy nested dictionaries and lists with their tensors moved to a device."""
    if isinstance(value, Mapping):
        return {key: _move_to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_move_to_device(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
