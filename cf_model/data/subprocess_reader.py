"""Reading untrusted files in child processes, so that a file that crashes or hangs its reader costs only itself."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read."""

    sentence: str  # the reason, the same on every run


def read_in_subprocess(
    task: Callable[[Any], T], paths: Sequence[Any], *, workers: int, timeout: float, environments: Sequence[Mapping[str, str]] = ()
) -> Generator[tuple[int, T | Unreadable], None, None]:
    """Yield (index, task(path)) of every path, in the order of completion.

    A ValueError of the task, the child's death, and more than `timeout` seconds on one file give Unreadable; any other
    exception is a fault of the task and is raised. `task` must be a function of a module, cheap to import. `environments`: variables
    of each child, such as the GPU that is its own. A path may be anything that has a `name`.
    """
    return work_off_queue(task, deque(enumerate(paths)), workers=workers, timeout=timeout, environments=environments)


def work_off_queue(
    task: Callable[[Any], T], queue: deque[tuple[int, Any]], *, workers: int, timeout: float, environments: Sequence[Mapping[str, str]] = ()
) -> Generator[tuple[int, T | Unreadable], None, None]:
    """Do as read_in_subprocess for the paths of a queue, each with its index; the caller may append more between two results.

    It ends when the queue is empty and no child is at work.
    """
    children: list[ReaderProcess[T]] = []
    try:
        while True:
            wanted = min(workers, len(queue) + sum(child.index is not None for child in children))
            begun = [ReaderProcess(task, *environments[k : k + 1]) for k in range(len(children), wanted)]
            children += begun
            for child in begun:
                child.wait_until_ready()
            for child in children:
                if child.index is None and queue:
                    child.start_file(*queue.popleft(), timeout)
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

    def __init__(self, task: Callable[[Any], T], environment: Mapping[str, str] | None = None) -> None:
        self.task, self.environment = task, dict(environment or {})
        self.index, self.path, self.deadline = None, Path(), float("inf")
        self.start()

    index: int | None
    path: Any

    def start(self) -> None:
        """Start a process that imports the task and waits for paths."""
        self.process, self.pipe = start_child(serve_reader, self.task, self.environment)

    def wait_until_ready(self) -> None:
        """Wait for the child's imports, whose seconds and failures are not a file's."""
        try:
            self.pipe.recv()
        except EOFError:
            raise RuntimeError("a process that reads videos could not start; its error stands above") from None

    def start_file(self, index: int, path: Any, timeout: float) -> None:
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


class StreamingReader(Generic[T]):
    """A child process that reads one file after the other and hands over each piece as soon as it is read.

    `task` gives the pieces of a file; it must be a function of a module, cheap to import, or a partial of one. The child reads ahead
    by what a pipe holds, so memory does not grow with a file's length. Use as a context manager.
    """

    def __init__(self, task: Callable[..., Iterator[T]], *, timeout: float) -> None:
        self.task, self.timeout = task, timeout
        self.process, self.pipe = None, None

    process: BaseProcess | None
    pipe: Connection | None

    def __enter__(self) -> StreamingReader[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def stream(self, path: Path, **options: Any) -> Iterator[T]:
        """Yield the pieces of a file, task(path, **options).

        Raises ValueError, with one sentence, if the file can't be read, crashes the child, or gives no piece for `timeout` seconds.
        """
        if self.process is None or self.pipe is None:
            self.process, self.pipe = start_child(serve_stream, self.task)
            self.pipe.recv()  # its imports, whose seconds are not a file's
        complete = False
        try:
            self.pipe.send((path, options))
            while True:
                if not self.pipe.poll(self.timeout):
                    raise ValueError(f"{path.name} was not read on within {self.timeout:g} s; replace it")
                piece, error = self.pipe.recv()
                if error is not None:
                    complete = isinstance(error, ValueError)
                    raise error
                if piece is None:
                    complete = True
                    return
                yield piece
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise ValueError(f"{path.name} crashed its reader (exit code {self.process.exitcode}); replace it") from None
        finally:
            if not complete:  # the child is in the middle of a file, or dead
                self.end()

    def end(self) -> None:
        """Kill the child, whatever it is doing."""
        if self.process is not None and self.pipe is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process, self.pipe = None, None


def start_child(
    serve: Callable[..., None], task: Callable[..., Any], environment: Mapping[str, str] | None = None
) -> tuple[BaseProcess, Connection]:
    """Start a process that imports the task, with further variables in its environment; return it with the pipe to it."""
    # Choice: spawn, because forking a process that has run torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(task, theirs), daemon=True)
    # A child of a pool, or of a Dask worker, is a daemon, to which multiprocessing forbids children, because they could outlive it:
    # here they can't (prepare_child).
    getattr(multiprocessing.current_process(), "_config", {})["daemon"] = False
    before = dict(os.environ)
    try:
        os.environ.update(environment or {})
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    return process, pipe


def prepare_child() -> None:
    """Silence FFmpeg, which writes thousands of lines about a bad file, and die with the parent even inside a decoder that hangs."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def serve_stream(task: Callable[..., Iterator[Any]], pipe: Connection) -> None:
    """Run a child: take a path and options, send each piece as (piece, None), then (None, error or None)."""
    prepare_child()
    pipe.send("ready")
    while True:
        try:
            path, options = pipe.recv()
        except EOFError:
            return
        error: Exception | None = None
        try:
            for piece in task(path, **options):
                pipe.send((piece, None))
        except MemoryError:
            error = ValueError(f"{path.name} needs more memory than there is; replace it by a smaller one")
        except Exception as fault:
            error = fault
        pipe.send((None, error))


def serve_reader(task: Callable[[Path], T], pipe: Connection) -> None:
    """Run a child: take a path, send (result, error), until the parent closes the pipe."""
    prepare_child()
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
