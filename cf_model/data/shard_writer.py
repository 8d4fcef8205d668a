"""Writing of safetensors files of bounded size ("shards"), one after the other.

Each tensor goes into the last shard, or begins the next one if it does not fit; a tensor larger than a shard has one for itself. So the
same tensors in the same order give the same files. A shard appears whole or not at all, and KIND.jsonl lists what the complete ones hold,
a line a shard: a writer that was killed goes on after the last of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .scratch import ScratchMap
from .shards import shard_name

MIB = 2**20


class ShardWriter:
    """Writer of named tensors to the shards of one kind. At most one shard of tensors is in memory, and its entries are in a file.

    `entries` has, by name and in the order of writing, each tensor's shard and the facts that were given with it. After a kill it begins
    with those of the complete shards, so that a caller skips what is there; the caller's tensors must then be the same as before.
    """

    def __init__(self, folder: Path, kind: str, mib: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.kind, self.room = folder, kind, mib * MIB
        self.journal = folder / f"{kind}.jsonl"
        self.entries: MutableMapping[str, dict[str, Any]] = ScratchMap(folder.parent)
        self.waiting: dict[str, Tensor] = {}
        self.bytes = 0  # of those
        self.number = 0  # of the shard that is being filled
        # What a killed writer left of a line goes, because the next line must begin on its own.
        partial = self.journal.with_name(f"{self.journal.name}.partial")
        with partial.open("w") as file:
            for facts in self._read_journal():
                self.entries.update({name: about | {"shard": self.number} for name, about in facts.items()})
                self.number += 1
                file.write(json.dumps(facts) + "\n")
        partial.replace(self.journal)

    def _read_journal(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yield the lines of the journal up to the first one that is cut off, or whose shard is gone."""
        if not self.journal.is_file():
            return
        with self.journal.open() as lines:
            for number, line in enumerate(lines):
                if not (line.endswith("\n") and (self.folder / shard_name(self.kind, number)).is_file()):
                    return
                yield json.loads(line)

    def add(self, name: str, tensor: Tensor, **facts: Any) -> None:
        """Add a tensor; the shard before it is written if the tensor does not fit there."""
        if self.waiting and self.bytes + tensor.nbytes > self.room:
            self._write_shard()
        # A copy, because a view would keep all that it is a part of in memory.
        self.waiting[name] = tensor.to("cpu", copy=True).contiguous()
        self.bytes += tensor.nbytes
        self.entries[name] = facts | {"shard": self.number}

    def _write_shard(self) -> None:
        path = self.folder / shard_name(self.kind, self.number)
        partial = path.with_name(f"{path.name}.partial")
        save_file(self.waiting, partial)
        partial.replace(path)
        facts = {name: {key: value for key, value in self.entries[name].items() if key != "shard"} for name in self.waiting}
        with self.journal.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        self.waiting.clear()
        self.bytes = 0
        self.number += 1

    def close(self) -> int:
        """Write the last shard, remove the journal, and return the number of shards."""
        if self.waiting:
            self._write_shard()
        self.journal.unlink()
        return self.number
