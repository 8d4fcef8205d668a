"""Runs a command so that nothing of it outlives its end, its cancellation, or the death of this process (flows/supervise/guardian.py)."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from flows.supervise import gpus as gpu_locks
from flows.supervise import guardian
from tasks.files.settings import read_settings

_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


class Stopped(RuntimeError):
    """The run was cancelled or is failing: no command starts any more."""


def run(
    command: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    line: Callable[[str], None],
    gpus: int = 0,
    timeout: float | None = None,
) -> int:
    """The command's exit code. Each line of its output goes to `line`, in this thread, as it comes.

    It has `gpus` GPUs to itself and sees no others (with 0: none). TimeoutError after `timeout` seconds, which do not count
    the wait for GPUs. The locks are the guardian's too: they are free when the last process of the command is dead.
    """
    word = secrets.token_hex(8)
    with gpu_locks.lock_gpus(gpus, line, _stopping.is_set) as held:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, held))}
        process = subprocess.Popen(
            [sys.executable, "-I", guardian.__file__, word, str(read_settings().grace), *command],
            cwd=cwd,
            # not the mark of this process: nobody is to sweep up the guardian while it cleans up
            env={key: value for key, value in (os.environ if env is None else env).items() if key != guardian.MARK} | visible,
            stdin=subprocess.PIPE,  # never written: it ends when this process does
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=tuple(held.values()),
        )
        return _follow_output(process, word, line, timeout)


def _follow_output(process: subprocess.Popen[str], word: str, line: Callable[[str], None], timeout: float | None) -> int:
    late = threading.Event()
    watch = threading.Thread(target=_enforce_timeout, args=(process, word, timeout, late), daemon=True)
    _running.add(process)
    try:
        watch.start()
        if _stopping.is_set():
            _terminate_process(process)
        for said in process.stdout or ():
            line(said.rstrip("\n"))
    finally:
        _terminate_process(process)
        watch.join()
        _running.discard(process)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
    if late.is_set():
        raise TimeoutError(f"took longer than its {timeout:g} s and was ended")
    if _stopping.is_set():
        raise Stopped("ended because the run was stopped")
    return process.returncode


def _enforce_timeout(process: subprocess.Popen[str], word: str, timeout: float | None, late: threading.Event) -> None:
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        late.set()
        _terminate_process(process)
        process.wait()
    if process.returncode < 0:  # the guardian was killed, and what it guarded may live and hold the pipe open
        guardian.end_marked(word, 0.0)


def _terminate_process(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def stop_commands() -> None:
    """Ends all commands of this process, and lets none start until start(). For a flow that ends before its stages."""
    _stopping.set()
    for process in list(_running):
        _terminate_process(process)


def allow_commands() -> None:
    _stopping.clear()


def is_stopping() -> bool:
    return _stopping.is_set()


def mark_environment() -> None:
    """Lets sweep() find what this process starts without a guardian, once it is dead: Prefect's temporary server, for one."""
    os.environ[guardian.MARK] = guardian.make_mark(secrets.token_hex(8))


def end_orphans() -> list[int]:
    """Ends what guardians that were themselves killed together with their starters have left; the process numbers."""
    lost = {mark.split(":")[0] for _, mark in guardian.find_marked() if not guardian.is_alive(mark)}
    return sorted(pid for word in lost for pid in guardian.end_marked(word, read_settings().grace))
