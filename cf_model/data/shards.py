"""Safetensors files of bounded size ("shards"), which shard_writer.py writes: shard n of a kind is KIND-000nn.safetensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def shard_name(kind: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{kind}-{number:05d}.safetensors"


class ShardReader:
    """Reader of tensors by shard and name. A shard is mapped into memory when it is first read, and only what is asked for is read."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.opened = cache(lambda number: safe_open(folder / shard_name(kind, number), framework="pt"))

    def read(self, shard: int, name: str) -> Tensor:
        """Read a whole tensor."""
        return self.opened(shard).get_tensor(name)

    def read_part(self, shard: int, name: str, first: int, length: int) -> Tensor:
        """Read `length` of a tensor's rows from `first` on."""
        return self.opened(shard).get_slice(name)[first : first + length]
