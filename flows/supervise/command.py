"""Commands of which no process outlives their end, their cancellation, or the death of this process (flows/supervise/guardian.py)."""

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.supervise import gpus as gpu_locks
from flows.supervise import guardian
from tasks.files.settings import read_settings

_running: set[subprocess.Popen[str]] = set()
stopping = threading.Event()  # set by `stop_commands`; every wait of a flow asks it


class Stopped(RuntimeError):
    """The run was cancelled or is failing, so its commands end and no command starts."""


def run(
    command: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    line: Callable[[str], None],
    gpus: int = 0,
    timeout: float | None = None,
) -> int:
    """Run a command and return its exit code. Each line of its output goes to `line`, in this thread, as it comes.

    The command has `gpus` GPUs to itself and sees no others (with 0: none). Raises TimeoutError after `timeout` seconds, which do not
    count the wait for GPUs, and Stopped. The guardian inherits the locks of the GPUs, so they stay locked until the last process of
    the command is dead.
    """
    word = secrets.token_hex(8)
    with gpu_locks.lock_gpus(gpus, line, stopping.is_set) as locks:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, locks))}
        with subprocess.Popen(
            [sys.executable, "-I", guardian.__file__, word, str(read_settings().grace), *command],
            cwd=cwd,
            # without the mark of this process, because end_orphans() must not end a guardian that still cleans up
            env={key: value for key, value in (os.environ if env is None else env).items() if key != guardian.MARK} | visible,
            stdin=subprocess.PIPE,  # never written: it ends when this process does
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=tuple(locks.values()),
        ) as process:
            return _follow_output(process, word, line, timeout)


def run_logged(words: list[str], *, log: Callable[[str], object], **options: Any) -> tuple[int, list[str]]:
    """Run a command as `run` does; return its exit code and its lines but for blank ones. Each line goes to `log` as it comes."""
    lines: list[str] = []

    def read_line(line: str) -> None:
        if line.strip():
            lines.append(line.rstrip())
            log(lines[-1])

    return run(words, line=read_line, **options), lines


def _follow_output(process: subprocess.Popen[str], word: str, line: Callable[[str], None], timeout: float | None) -> int:
    """Hand on the lines of a guardian until its command has ended, however this function is left; return the exit code."""
    late = threading.Event()
    watch = threading.Thread(target=_enforce_timeout, args=(process, word, timeout, late), daemon=True)
    _running.add(process)
    try:
        watch.start()
        if stopping.is_set():
            process.terminate()
        for text in process.stdout or ():
            line(text.rstrip("\n"))
    finally:
        process.terminate()
        watch.join()
        _running.discard(process)
    if late.is_set():
        raise TimeoutError(f"took longer than its {timeout:g} s and was ended")
    if stopping.is_set():
        raise Stopped("ended because the run was stopped")
    return process.returncode


def _enforce_timeout(process: subprocess.Popen[str], word: str, timeout: float | None, late: threading.Event) -> None:
    """Ask a guardian to end after `timeout` seconds, and clean up behind a guardian that was killed."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        late.set()
        process.terminate()
        process.wait()
    if process.returncode < 0:  # the guardian was killed; processes of the command may live and hold the pipe open
        guardian.end_marked(word, 0.0)


def stop_commands() -> None:
    """End all commands of this process, and let none start until `allow_commands`. For a flow that ends before its stages."""
    stopping.set()
    for process in list(_running):
        process.terminate()


def allow_commands() -> None:
    """Let commands start again after `stop_commands`."""
    stopping.clear()


def mark_environment() -> None:
    """Mark this process, so that end_orphans() finds what it started without a guardian once it is dead: Prefect's temporary server."""
    os.environ[guardian.MARK] = guardian.make_mark(secrets.token_hex(8))


def end_orphans() -> list[int]:
    """End what guardians have left that were killed together with their starters; return the process numbers."""
    words = {mark.split(":")[0] for _, mark in guardian.find_marked() if not guardian.is_alive(mark)}
    return sorted(pid for word in words for pid in guardian.end_marked(word, read_settings().grace))
