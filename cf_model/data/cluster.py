"""The same work as in subprocess_reader.py, on a Dask cluster: whoever has more machines gives the address of a scheduler.

The workers need this project and the same files under the same paths, as on a shared disk. Each piece of work runs in a child of its
worker, with the same limit of time, so that a bad file costs only itself there too.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeVar

from .subprocess_reader import ReaderProcess, Unreadable

if TYPE_CHECKING:
    from distributed import Future

T = TypeVar("T")
AHEAD = 4  # pieces of work for each thread of the cluster that are under way or wait for their turn, so that memory is bounded
CHILDREN = threading.local()  # on a worker: the child of each thread, and the task that it runs
RETRIES = 3  # of a piece of work whose result was lost with its worker; Dask repeats work of a dead worker by itself as often


def run_on_cluster(
    task: Callable[[Any], T], queue: deque[tuple[int, Any]], *, address: str, timeout: float
) -> Generator[tuple[int, T | Unreadable], None, None]:
    """Yield (index, task(item)) of every (index, item) of a queue, each once and in order, however often workers die meanwhile; the caller
    may append more between two results.

    A ValueError of the task, its child's death, and more than `timeout` seconds on an item give Unreadable; any other exception is
    raised. Raises ValueError if `distributed` is not installed or no scheduler answers at `address`.
    """
    client = connect_client(address)
    try:
        ahead = max(AHEAD, AHEAD * sum(client.nthreads().values()))
        waiting: deque[tuple[int, Future]] = deque()
        while queue or waiting:
            while queue and len(waiting) < ahead:
                index, item = queue.popleft()
                # impure, because the same file may have changed since Dask last saw its name
                waiting.append((index, client.submit(run_in_child, task, item, timeout, pure=False, retries=RETRIES)))
            index, future = waiting.popleft()
            yield index, future.result()
            future.release()
    finally:
        client.close()


def connect_client(address: str) -> Any:
    """Return a client of the scheduler at `address`."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(f"CF_DASK is {address}, and distributed is not installed; pip install -r requirements/cluster.txt") from None
    try:
        return Client(address, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"CF_DASK is {address}, where no Dask scheduler answers ({error}); start one, or unset it") from None


def run_in_child(task: Callable[[Any], T], item: Any, timeout: float) -> T | Unreadable:
    """Run a task on one item in the child of this thread, which stays for the next item of the same task."""
    key = pickle.dumps(task)
    if getattr(CHILDREN, "key", None) != key:
        if hasattr(CHILDREN, "child"):
            CHILDREN.child.end()
        CHILDREN.child, CHILDREN.key = ReaderProcess(task), key
        CHILDREN.child.wait_until_ready()
    child: ReaderProcess[T] = CHILDREN.child
    child.start_file(0, item, timeout)
    while (answer := child.poll_answer(timeout)) is None:
        wait([child.pipe], max(0.0, child.deadline - time.monotonic()))
    return answer[1]
