"""Counting kernels, bytes, float64 bytes and host reads of code that runs on fake tensors, which have shapes and no numbers.

An operation reads each of its inputs and writes each of its outputs once, attention is one operation, and views cost nothing. So the
bytes are what eager execution moves at least, and the same on every machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "_addmm_activation", "_linear_pointwise")
# operations that allocate or describe memory and run nothing
NOTHING = ("device", "sym_size", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias")
HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2")
# of their first input these read only what they give out
GATHERS = ("index", "gather", "index_select", "embedding", "take_along_dim", "_unsafe_index")
# of their first input these write only what they are given
SCATTERS = ("index_put", "index_copy", "scatter")
WIDE = (torch.float64, torch.complex128)


@dataclass
class Count:
    """Kernels and bytes of one kind of operation."""

    kernels: float = 0
    bytes: float = 0
    wide_bytes: float = 0  # in float64


@dataclass
class Tally:
    """Everything that was counted, by the name of the operation."""

    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    host_reads: float = 0
    uploads: float = 0  # tensors made of Python's numbers, each a copy to the device

    def combine(self, other: Tally, own: float, others: float) -> Tally:
        """Return `own` times this tally and `others` times the other: what is linear in the number of layers is found so."""
        out = Tally(host_reads=own * self.host_reads + others * other.host_reads, uploads=own * self.uploads + others * other.uploads)
        for name in {*self.counts, *other.counts}:
            a, b = self.counts.get(name, Count()), other.counts.get(name, Count())
            values = {key: own * getattr(a, key) + others * getattr(b, key) for key in vars(a)}
            out.counts[name] = Count(**values)
        return out

    def total(self, what: str, names: Callable[[str], bool] = lambda name: True) -> float:
        """Sum kernels, bytes or wide_bytes over the operations whose names are chosen."""
        return sum(getattr(count, what) for name, count in self.counts.items() if names(name))


def is_product(name: str) -> bool:
    """Say whether an operation is a matrix product, a convolution or an attention."""
    return name in PRODUCTS or "scaled_dot_product" in name


class KernelCounter(TorchDispatchMode):
    """Mode that counts every operation below it."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func._schema.name.split("::")[1], [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in HOST_READS:
            self.tally.host_reads += 1
        if name == "lift_fresh":
            self.tally.uploads += 1
        made = func(*args, **(kwargs or {}))
        if name not in NOTHING and name not in HOST_READS:
            self.count(name, func, given, [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)])
        return made

    def count(self, name: str, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Count one operation, unless it only gives another view of what it was given."""
        mutates = func._schema.is_mutable
        if not mutates and made and all(any(is_same_storage(out, tensor) for tensor in given) for out in made):
            return
        name = name.rstrip("_")
        read, written = given, made
        if mutates:
            # the first input is written; what it held is read but by fill and copy
            read = given[1:] if name in ("fill", "copy", "zero") else given
            written = given[:1]
        if name in SCATTERS and mutates:
            # the values come last
            read, written = given[1:], given[-1:]
        if name in GATHERS:
            read = [*given[1:], *made]
        self.add(name, [*read, *written])

    def add(self, name: str, touched: list[Tensor]) -> None:
        """Count one kernel that reads or writes these tensors."""
        count = self.tally.counts[name]
        count.kernels += 1
        count.bytes += sum(map(count_bytes, touched))
        count.wide_bytes += sum(count_bytes(tensor) for tensor in touched if tensor.dtype in WIDE)


class FusedNorms(TorchFunctionMode):
    """Mode that counts an RMS norm as one operation, which it is on a GPU; on a CPU torch takes it apart."""

    def __init__(self, counter: KernelCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        before, self.counter.tally = self.counter.tally, Tally()  # of which nothing is kept
        out = func(*args, **(kwargs or {}))
        self.counter.tally = before
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.counter.add("rms_norm", [*given, out])
        return out


def is_same_storage(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are views of the same memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def count_bytes(tensor: Tensor) -> int:
    """Count the bytes of a tensor; a dimension that is only expanded counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(1 if stride == 0 and size else size for size, stride in sizes)


def count_kernels(run: Callable[[], object]) -> Tally:
    """Return what a function on fake tensors does. It may not read a tensor's value, because there is none."""
    with KernelCounter() as counter, FusedNorms(counter):
        run()
    return counter.tally


def list_largest(tally: Tally, *, below: float = 0.0) -> Iterator[tuple[str, Count]]:
    """Yield operations by their bytes, largest first."""
    yield from sorted(((name, count) for name, count in tally.counts.items() if count.bytes > below), key=lambda item: -item[1].bytes)
