"""One batch, computed in shares: by several processes, and by each of them in groups, one after the other.

Ranks are processes that share a batch (data parallelism); groups are accumulation. All draw the same random numbers for the
whole batch and keep their rows of them, and gradients are averaged, so the result is one process's up to rounding. Nothing
but the environment says how many ranks there are (tasks/runner/ranks.py); with one, nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cf_model.model import memory
from cf_model.model.flow import Shared


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Of the ranks, the one that writes."""
    return rank() == 0


T = TypeVar("T")


class Random:
    """A seeded stream of numbers that a checkpoint can hold: those of the whole batch, on every rank and every device.

    `groups` goes through the parts that this rank takes one after the other. Each sees the same stream, of whose numbers
    for the batch it keeps its rows, and the promotions of the first: one decision for the whole batch (memory.mean_key).
    """

    def __init__(self, seed: int, device: torch.device | None = None, *, groups: int = 1) -> None:
        self.rng, self.count = Shared(device or "cpu", rank(), ranks() * groups, groups), groups
        self.rng.manual_seed(seed)

    def groups(self) -> Iterator[int]:
        if self.count == 1:
            yield 0
            return
        before, tape, self.rng.tape = self.rng.get_state(), memory.Tape(), []
        try:
            for group in range(self.count):
                self.rng.set_state(before)
                self.rng.part, self.rng.read = group * ranks() + rank(), 0
                with memory.decided(tape):
                    yield group
        finally:
            self.rng.part, self.rng.tape = rank(), None

    def label(self, **values: Tensor) -> dict[str, Tensor]:
        """What a group is made of, by names that are its own: kept when a step goes wrong."""
        group = self.rng.part // ranks()
        return {f"{name}_{group}" if self.count > 1 else name: value for name, value in values.items()}

    def mine(self, rows: Sequence[T]) -> list[T]:
        """Those rows of the batch that are computed now."""
        each = len(rows) // self.rng.parts
        return list(rows[self.rng.part * each : (self.rng.part + 1) * each])

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """Uniform in low..high, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.rng).tolist()

    def coin(self, chance: float) -> bool:
        return float(torch.rand((), generator=self.rng)) < chance

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])


def of_all_ranks(rows: Tensor) -> Tensor:
    """The rows that each rank has, in the order of ranks, on every one."""
    if ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def from_all(mine: Mapping[int, Tensor], rows: Sequence[int], like: Tensor) -> Tensor:
    """What the ranks found of these rows of the batch, in their order; each row is one rank's, each the size of `like`."""
    found = like.new_zeros(len(rows), *like.shape)
    for place, row in enumerate(rows):
        if row in mine:
            found[place] = mine[row]
    if ranks() > 1 and rows:
        dist.all_reduce(found)  # one of the terms is not 0, so the sum is exact
    return found


def mean_values(values: Mapping[str, float], asked: bool) -> tuple[dict[str, float], bool]:
    """What a step says of itself, over the ranks; and whether any of them was asked to stop."""
    if ranks() == 1:
        return dict(values), asked
    told = torch.tensor([float(asked), *values.values()], dtype=torch.float64, device=_device())
    dist.all_reduce(told)
    any_asked, *sums = told.tolist()
    return {name: total / ranks() for name, total in zip(values, sums, strict=True)}, any_asked > 0


def agree_on_start(step: int) -> int:
    """All ranks go on from the same checkpoint, or none does."""
    if ranks() == 1:
        return step
    found = [torch.zeros((), dtype=torch.long, device=_device()) for _ in range(ranks())]
    dist.all_gather(found, torch.tensor(step, device=_device()))
    steps = [int(one) for one in found]
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks found checkpoints of steps {steps}; put the working folder where all of them read the same files")
    return step


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
