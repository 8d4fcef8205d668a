"""What is computed of single clips, once each: by processes of this machine, or on a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .cluster import run_on_cluster
from .subprocess_reader import Unreadable, read_in_subprocess


class PayloadCache(Protocol):
    """Results of earlier runs, by a clip's content."""

    def get(self, content: str) -> bytes | None: ...
    def put(self, content: str, payload: bytes) -> None: ...


@dataclass(frozen=True)
class ClipPool:
    """Where clips are worked on."""

    workers: int  # processes of this machine; 0: this one
    timeout: float  # seconds that one clip may take
    cluster: str | None = None  # address of a Dask scheduler, whose workers do it instead
    environments: Sequence[Mapping[str, str]] = ()  # variables of each process, such as the GPU that is its own

    def run_task(self, task: Callable[[Any], bytes], clips: Sequence[Any]) -> Iterator[tuple[int, bytes | Unreadable]]:
        """Yield (index, task(clip)) of every clip; a clip has a `name`, for sentences about it."""
        if clips and self.cluster:
            return run_on_cluster(task, clips, address=self.cluster, timeout=self.timeout)
        return read_in_subprocess(task, clips, workers=self.workers, timeout=self.timeout, environments=self.environments)

    def compute_payloads(
        self, cache: PayloadCache, contents: Sequence[str], clips: Sequence[Any], task: Callable[[Any], bytes]
    ) -> Iterator[bytes | Unreadable]:
        """Yield task(clip) of every clip in order; only clips whose content the cache does not know are computed.

        Results are stored as they come, so that an interrupted run goes on where it stopped.
        # Choice: an unreadable file is tried again each time, because it may have been too slow for a busy machine.
        """
        if not (self.workers or self.cluster):
            yield from self._compute_here(cache, contents, clips, task)
            return
        new = [i for i, content in enumerate(contents) if cache.get(content) is None]
        computing = self.run_task(task, [clips[i] for i in new])
        early: dict[int, bytes | Unreadable] = {}  # results of clips whose turn has not come: some take longer than others
        waiting = set(new)
        for i, content in enumerate(contents):
            while i in waiting and i not in early:
                j, result = next(computing)
                early[new[j]] = result
                if isinstance(result, bytes):
                    cache.put(contents[new[j]], result)
            payload = early.pop(i) if i in waiting else cache.get(content)
            if payload is None:
                raise RuntimeError("a result was removed from the clips' cache while it was read; run the stage again")
            yield payload

    def _compute_here(
        self, cache: PayloadCache, contents: Sequence[str], clips: Sequence[Any], task: Callable[[Any], bytes]
    ) -> Iterator[bytes]:
        """Do as compute_payloads in this process, where each entry of the cache is read once."""
        for content, clip in zip(contents, clips, strict=True):
            payload = cache.get(content)
            if payload is None:
                payload = task(clip)
                cache.put(content, payload)
            yield payload
