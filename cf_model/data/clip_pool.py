"""What is computed of single clips, once each: by processes of this machine, or on a Dask cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from .cluster import run_on_cluster
from .subprocess_reader import Unreadable, work_off_queue

# Both bound the memory that waiting for a slow clip takes, however many clips there are.
AHEAD = 1024  # clips that are looked at before their turn: one that the cache does not know is begun early
UNDER_WAY = 8  # clips for each process that are being computed, or done before their turn, whose results are in memory


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

    def run_task(
        self, task: Callable[[Any], bytes], queue: deque[tuple[int, Any]]
    ) -> Generator[tuple[int, bytes | Unreadable], None, None]:
        """Yield (number, task(clip)) of the queue's clips, to which more may come; a clip has a `name`, for sentences about it."""
        if self.cluster:
            return run_on_cluster(task, queue, address=self.cluster, timeout=self.timeout)
        return work_off_queue(task, queue, workers=self.workers, timeout=self.timeout, environments=self.environments)

    def compute_payloads(
        self, cache: PayloadCache, clips: Iterable[tuple[str, Any]], task: Callable[[Any], bytes]
    ) -> Iterator[bytes | Unreadable]:
        """Yield task(clip) of every (content, clip) in order; only clips whose content the cache does not know are computed.

        Results are stored as they come, so that an interrupted run goes on where it stopped. `clips` is read as far as AHEAD and
        UNDER_WAY say.
        # Choice: an unreadable file is tried again each time, because it may have been too slow for a busy machine.
        """
        if not (self.workers or self.cluster):
            yield from self._compute_here(cache, clips, task)
            return
        most = AHEAD if self.cluster else UNDER_WAY * self.workers  # a cluster gives results in order and limits itself
        coming, turns = enumerate(clips), deque[tuple[int, str]]()
        queue, new = deque[tuple[int, Any]](), dict[int, str]()  # not yet computed; number -> content of those without a result
        early: dict[int, bytes | Unreadable] = {}  # results of clips whose turn has not come: some take longer than others
        with closing(self.run_task(task, queue)) as computing:
            while True:
                while len(turns) < AHEAD and len(new) + len(early) < most and (following := next(coming, None)):
                    number, (content, clip) = following
                    turns.append((number, content))
                    if cache.get(content) is None:
                        queue.append((number, clip))
                        new[number] = content
                if not turns:
                    return
                number, content = turns.popleft()
                while number in new:
                    done, result = next(computing)
                    early[done] = result
                    if isinstance(result, bytes):
                        cache.put(new[done], result)
                    del new[done]
                payload = early.pop(number) if number in early else cache.get(content)
                if payload is None:
                    raise RuntimeError("a result was removed from the clips' cache while it was read; run the stage again")
                yield payload

    def _compute_here(self, cache: PayloadCache, clips: Iterable[tuple[str, Any]], task: Callable[[Any], bytes]) -> Iterator[bytes]:
        """Do as compute_payloads in this process, where each entry of the cache is read once."""
        for content, clip in clips:
            payload = cache.get(content)
            if payload is None:
                payload = task(clip)
                cache.put(content, payload)
            yield payload
