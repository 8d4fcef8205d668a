"""Running of a generator in a thread of its own, one item ahead: the next chunk is generated while the last one is decoded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
WAIT = 0.2  # seconds after which a full queue is tried again, so that a thread whose reader has left ends


def iterate_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield what `items` yields, in its order, while a thread makes the next item. What it raises is raised here.

    At most one item waits. When the reader leaves, the thread ends after the item that it is making.
    """
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=1)
    left = threading.Event()

    def offer(is_item: bool, value: T | BaseException | None) -> None:
        while not left.is_set():
            try:
                return made.put((is_item, value), timeout=WAIT)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer(True, item)
                if left.is_set():
                    return
            offer(False, None)
        except BaseException as error:  # whatever it is, the reader is told
            offer(False, error)

    thread = threading.Thread(target=work, name="chunks", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value  # type: ignore[misc]
            elif value is None:
                return
            else:
                raise value  # type: ignore[misc]
    finally:
        left.set()
        thread.join()
