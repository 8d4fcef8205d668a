"""Share one batch among several processes (ranks), and within each process among groups that are computed one after the other.

Ranks are data parallelism, groups are gradient accumulation. A row's noise follows from its number in the whole batch, and gradients
are averaged, so the result equals that of one process up to rounding. The number of ranks comes
from the environment alone (tasks/runner/ranks.py); with one rank nothing here communicates.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from cf_model.model.flow import BatchGenerator

Row = TypeVar("Row")


def get_rank() -> int:
    """Return this process's number among the ranks, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count_ranks() -> int:
    """Return the number of processes that share each batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Tell whether this rank is the only one that writes checkpoints and videos."""
    return get_rank() == 0


def join_ranks() -> Store:
    """Meet the other ranks, and return the store in which they share words. Ends this process if the launcher dies."""
    threading.Thread(target=_end_with_the_launcher, args=(os.getppid(),), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(iter(rendezvous("env://")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return store


def _end_with_the_launcher(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class BatchRandom:
    """Seeded random numbers of the batches of a training, which follow from the step and so have no state.

    `rng` are the numbers of the current step and group; `count` is the number of groups in which this rank takes its share of a batch.
    """

    def __init__(self, seed: int, device: torch.device | None = None, *, batch: int, groups: int = 1) -> None:
        self.seed, self.device, self.count = seed, device or torch.device("cpu"), groups
        self.parts, self.rows = count_ranks() * groups, batch // (count_ranks() * groups)  # of the batch, and rows of a part
        self.part = get_rank()  # that `rng` and `take_own` answer for
        self.rng = self.draw_step(0)

    def draw_step(self, step: int) -> BatchGenerator:
        """Return the random numbers of a step from their beginning, for the rows of the current group."""
        # Noise belongs to a row of the whole batch, whichever rank or group computes that row. So the result does not depend on how
        # the batch is divided.
        first = self.part * self.rows
        videos = ((self.seed, step, row) for row in range(first, first + self.rows))
        return BatchGenerator(videos, self.device, shared=(self.seed, step), first=first)

    def groups(self, step: int) -> Iterator[int]:
        """Yield the numbers of this rank's groups, and make `rng` and `take_own` answer for that group of the step's batch.

        All groups share the numbers that are drawn once for the batch, and each has its own rows', so together they are the batch.
        """
        # Parts are numbered group by group: with R ranks, group g of rank r is part g * R + r.
        for group in range(self.count):
            self.part = group * count_ranks() + get_rank()
            self.rng = self.draw_step(step)
            yield group

    def label(self, **values: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the current group under names of their own, for the record of a bad step."""
        group = self.part // count_ranks()
        return {f"{name}_{group}" if self.count > 1 else name: value for name, value in values.items()}

    def take_own(self, rows: Sequence[Row]) -> list[Row]:
        """Return those rows of the batch that this rank's current group computes."""
        # A batch of P parts: part p has the rows p * B/P to (p + 1) * B/P - 1. `rows` may hold several entries for each row.
        each = len(rows) // self.parts
        return list(rows[self.part * each : (self.part + 1) * each])

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """Draw `count` integers, uniform in low..high, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.rng).tolist()

    def coin(self, chance: float) -> bool:
        """Draw true with the probability `chance`: one draw for the whole batch."""
        return float(torch.rand((), generator=self.rng)) < chance


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in the order of ranks, on every rank."""
    if count_ranks() == 1:
        return rows
    # Every rank hands in as many rows as the others, because all_gather takes tensors of one shape only: [R * rows, ...].
    parts = [torch.empty_like(rows) for _ in range(count_ranks())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_by_row(own: Mapping[int, Tensor], rows: Sequence[int], like: Tensor) -> Tensor:
    """Stack the tensors of these rows of the batch, in their order, on every rank.

    `own` holds the rows that this rank has computed; each row belongs to one rank, and each tensor has the size of `like`.
    """
    # A row that another rank has computed stays 0 here, and the sum over all ranks fills it in.
    stacked = like.new_zeros(len(rows), *like.shape)
    for place, row in enumerate(rows):
        if row in own:
            stacked[place] = own[row]
    if count_ranks() > 1 and rows:
        dist.all_reduce(stacked)  # exact, because all terms of a row's sum but one are 0
    return stacked


def average_values(values: Mapping[str, float], stop: bool) -> tuple[dict[str, float], bool]:
    """Average a step's values over the ranks; the second answer is true where any rank was asked to stop."""
    if count_ranks() == 1:
        return dict(values), stop
    # float64, so that a mean over ranks is exact to the six digits that are logged.
    sums = torch.tensor([float(stop), *values.values()], dtype=torch.float64, device=_choose_device())
    dist.all_reduce(sums)
    stops, *totals = sums.tolist()
    return {name: total / count_ranks() for name, total in zip(values, totals, strict=True)}, stops > 0


def agree_on_start(step: int) -> int:
    """Return `step`, the newest checkpoint's. Raises ValueError where the ranks found different checkpoints."""
    if count_ranks() == 1:
        return step
    # Ranks on machines with folders of their own may find different files; training on would mix two states.
    answers = [torch.zeros((), dtype=torch.long, device=_choose_device()) for _ in range(count_ranks())]
    dist.all_gather(answers, torch.tensor(step, device=_choose_device()))
    steps = [int(answer) for answer in answers]
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks found checkpoints of steps {steps}; put the working folder where all of them read the same files")
    return step


def _choose_device() -> str:
    """Return the device whose tensors the process group's backend can send."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
