"""Runs one command and lets nothing of it live longer. A script: flows/supervise/command.py starts it, and it imports nothing of ours.

It ends with the command, or when it is told to (SIGTERM), or when the process that started it is gone, however that died.
Then everything the command has left behind is asked to end and, after a grace, ended: its children, those that have sessions
of their own, and those that have lost their parents. They are found by family (as a subreaper, this process inherits orphans)
and by a word in their environment, which also finds them after this process itself was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARK = "CF_GUARD"  # in the environment of all that the command starts; see mark()
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere psutil alone has to find what is left."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def read_start(pid: int) -> str:
    """With its number this is one process until the machine is off; in ticks since the start, because a clock may be set."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not in every sandbox
            boot, stat = (Path(file).read_text(errors="replace") for file in ("/proc/sys/kernel/random/boot_id", f"/proc/{pid}/stat"))
            return f"{boot.strip()}/{stat.rpartition(')')[2].split()[19]}"
    return f"{psutil.Process(pid).create_time():.2f}"


def read_namespace() -> str:
    """Process numbers mean something inside of it only: on the host, those of a container are other processes'."""
    return os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else ""


def make_mark(word: str) -> str:
    """What this process puts into the environment of all that it starts."""
    return f"{word}:{os.getpid()}:{read_start(os.getpid())}:{read_namespace()}"


def find_marked() -> list[tuple[psutil.Process, str]]:
    """All living processes of this user that any guardian of this namespace has started, with their marks."""
    found, here = [], f":{read_namespace()}"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = "" if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK, "")
            if mark.endswith(here):
                found.append((process, mark))
    return found


def is_alive(mark: str) -> bool:
    """Is the guardian that wrote this mark still there? A number that another process has by now has another beginning."""
    _, pid, since, _ = mark.split(":", 3)
    with contextlib.suppress(psutil.Error):
        return read_start(int(pid)) == since and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE  # which guards nothing
    return False


def end_marked(word: str, grace: float, family: bool = False) -> list[int]:
    """Ends all that carry the word in their marks, and with `family` all that descend from this process: SIGTERM once, SIGKILL
    after the grace, until none is left."""
    asked: set[int] = set()
    until = time.monotonic() + grace
    while left := _find_left(word, family):
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() >= until:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
            asked.add(process.pid)
        if family:
            _reap_ended()
        time.sleep(0.05)
    return sorted(asked)


def _find_left(word: str, family: bool) -> list[psutil.Process]:
    found = {process.pid: process for process, mark in find_marked() if mark.startswith(f"{word}:")}
    if family:
        found |= {process.pid: process for process in _drop_zombies(psutil.Process().children(recursive=True))}
    return list(found.values())


def _drop_zombies(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _reap_ended(main: int | None = None) -> int | None:
    """Buries what has ended, orphans included; the exit code of `main` if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == main:
                code = os.waitstatus_to_exitcode(status)
    return code


def guard_command(word: str, grace: float, command: list[str]) -> int:
    """The command's exit code; 128 + signal where one ended it, and 143 where this process was told to stop."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, MARK: make_mark(word)},
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # of this process, which has one thread
    )
    lifeline = sys.stdin.fileno()
    code = None
    while code is None and not told:
        ready, _, _ = select.select([lifeline, bell], [], [], 5)
        if lifeline in ready and not os.read(lifeline, 1):
            told.append(signal.SIGHUP)  # whoever started this process is gone
        if bell in ready:
            os.read(bell, 512)
        code = _reap_ended(child.pid)
    end_marked(word, grace, family=True)
    return 143 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard_command(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
