"""Rollouts that outlive a step: those that the critic's updates share, and videos that go on from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cf_model.model.memory import MemorySpec, dump, restore
from cf_model.model.rollout import Rollout
from cf_model.train.trainer.ranks import Random, of_all_ranks


class Kept:
    """The rollouts that the critic's updates share. A checkpoint holds the random state before them: the student has not
    changed since, so they can be made again."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Rollout, Tensor]] = {}  # by group of the batch
        self.before = torch.empty(0)

    def clear(self) -> None:
        self.made, self.before = {}, torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before} if len(self.before) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made, self.before = {}, state.get("before", torch.empty(0))


class Stream:
    """The video that one group of the batch goes on with."""

    def __init__(self) -> None:
        self.frames, self.text = 0, torch.empty(0)
        self.made: Rollout | None = None


class Streams:
    """The videos that `persist: stream` goes on with; a checkpoint holds those of the whole batch, from all ranks."""

    def __init__(self, spec: MemorySpec, random: Random, device: torch.device) -> None:
        self.spec, self.random, self.device = spec, random, device
        self.groups = [Stream() for _ in range(random.count)]

    def state_dict(self) -> dict[str, Any]:
        if not self.groups[0].made:
            return {}
        parts = [{"text": one.text, "video": one.made.video, "memory": dump(one.made.memory)} for one in self.groups if one.made]
        return {"frames": self.groups[0].frames, **each(lambda *rows: torch.cat([of_all_ranks(one) for one in rows]), *parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups = [Stream() for _ in self.groups]
        if not state:
            return
        for group in self.random.groups():
            part, one = each(lambda rows: self.random.rng.rows(rows).contiguous(), state), self.groups[group]
            one.frames, one.text = part["frames"], part["text"]
            one.made = Rollout(part["video"], slice(0), (), (), restore(self.spec, moved(part["memory"], self.device)), ())


def each(change: Callable[..., Tensor], *values: Any) -> Any:
    """Nested dictionaries and lists of one shape with `change` on what belongs to the batch's videos: tensors of three
    dimensions or more. What is said of the batch as a whole is the same in all."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: each(change, *(value[key] for value in values)) for key in first}
    if isinstance(first, list | tuple):
        return [each(change, *items) for items in zip(*values, strict=True)]
    return change(*values) if isinstance(first, Tensor) and first.ndim > 2 else first


def moved(value: Any, device: torch.device) -> Any:
    """Nested dictionaries and lists with their tensors on a device."""
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
