"""Reading untrusted files in child processes, so that a file that crashes or hangs its reader costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read."""

    sentence: str  # the reason, the same on every run


def read_in_subprocess(
    task: Callable[[Path], T], paths: Sequence[Path], *, workers: int, timeout: float
) -> Iterator[tuple[int, T | Unreadable]]:
    """Yield (index, task(path)) of every path, in the order of completion.

    A ValueError of the task, the child's death, and more than `timeout` seconds on one file give Unreadable; any other
    exception is a fault of the task and is raised. `task` must be a function of a module, cheap to import.
    """
    waiting = deque(enumerate(paths))
    children = [ReaderProcess(task) for _ in range(min(workers, len(paths)))]
    try:
        for child in children:
            child.wait_until_ready()
        while True:
            for child in children:
                if child.index is None and waiting:
                    child.start_file(*waiting.popleft(), timeout)
            busy = [child for child in children if child.index is not None]
            if not busy:
                return
            wait([child.pipe for child in busy], max(0.0, min(child.deadline for child in busy) - time.monotonic()))
            for child in busy:
                answer = child.poll_answer(timeout)
                if answer is not None:
                    yield answer
    finally:
        for child in children:
            child.end()


class ReaderProcess(Generic[T]):
    """A child process and the file it is busy with. A child that dies or has to be ended is replaced by a new process."""

    def __init__(self, task: Callable[[Path], T]) -> None:
        self.task, self.index, self.path, self.deadline = task, None, Path(), float("inf")
        self.start()

    index: int | None

    def start(self) -> None:
        """Start a process that imports the task and waits for paths."""
        # Choice: spawn, because forking a process that has run torch's threads can hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_reader, args=(self.task, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the child's imports, whose seconds and failures are not a file's."""
        try:
            self.pipe.recv()
        except EOFError:
            raise RuntimeError("a process that reads videos could not start; its error stands above") from None

    def start_file(self, index: int, path: Path, timeout: float) -> None:
        """Hand the child its next file; `timeout` seconds from now it must have answered."""
        self.index, self.path, self.deadline = index, path, time.monotonic() + timeout
        self.pipe.send(path)

    def poll_answer(self, timeout: float) -> tuple[int, T | Unreadable] | None:
        """Return the file's index and result, or None while the child is still reading; replace a child that died or is late."""
        index = self.index
        assert index is not None
        result: T | Unreadable
        if self.pipe.poll():
            try:
                result, error = self.pipe.recv()
                if error is not None:
                    raise error
            except EOFError:
                self.process.join()
                result = Unreadable(f"{self.path.name} crashed its reader (exit code {self.process.exitcode}); replace it")
                self.restart()
        elif time.monotonic() > self.deadline:
            result = Unreadable(f"{self.path.name} was not read within {timeout:g} s; replace it or raise filter.timeout")
            self.restart()
        else:
            return None
        self.index = None
        return index, result

    def restart(self) -> None:
        """Replace the process by a new one, and wait until that is ready."""
        self.end()
        self.start()
        self.wait_until_ready()

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve_reader(task: Callable[[Path], T], pipe: Connection) -> None:
    """Run a child: take a path, send (result, error), until the parent closes the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's complaints about bad files, thousands of lines
    pipe.send("ready")
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        result: T | Unreadable | None = None
        error: Exception | None = None
        try:
            result = task(path)
        except ValueError as refused:
            result = Unreadable(str(refused))
        except MemoryError:
            result = Unreadable(f"{path.name} needs more memory than there is; replace it by a smaller one")
        except Exception as fault:
            error = fault
        pipe.send((result, error))
