"""Run one command and let none of its processes outlive it. A script that flows/supervise/command.py starts; it imports nothing of ours.

The guardian ends with the command, on SIGTERM, or when the process that started the guardian is gone, however that died.
Then everything that the command has left is asked to end and, after a grace, killed: its children, those in sessions of their own, and
those that have lost their parents. They are found by family (as a subreaper, the guardian inherits orphans) and by a word in their
environment, which also finds them after the guardian itself was killed.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "CF_GUARD"  # variable in the environment of all that the command starts; see make_mark()
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Call prctl(2), which exists on Linux only; elsewhere psutil alone has to find what is left."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def read_start(pid: int) -> str:
    """Return when a process began, which with its number identifies it; in ticks since the boot, because a clock may be set."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some sandboxes hide the two files
            boot, stat = (Path(file).read_text(errors="replace") for file in ("/proc/sys/kernel/random/boot_id", f"/proc/{pid}/stat"))
            return f"{boot.strip()}/{stat.rpartition(')')[2].split()[19]}"
    return f"{psutil.Process(pid).create_time():.2f}"


def read_namespace() -> str:
    """Return the namespace of process numbers; on the host, a container's numbers are those of other processes."""
    return os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else ""


def make_mark(word: str) -> str:
    """Return the mark that this process puts into the environment of all that it starts: word, number, beginning, namespace."""
    return f"{word}:{os.getpid()}:{read_start(os.getpid())}:{read_namespace()}"


def is_running(process: psutil.Process) -> bool:
    """Say whether a process runs. A zombie doesn't: in a container without an init its parent may never collect it."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def read_environments() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield the running processes of this user, but for this one, with their environments."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and is_running(process):
                yield process, process.environ()


def find_marked() -> list[tuple[psutil.Process, str]]:
    """Return the running processes of this user that any guardian of this namespace has started, with their marks."""
    marked = [(process, environment.get(MARK, "")) for process, environment in read_environments()]
    return [(process, mark) for process, mark in marked if mark.endswith(f":{read_namespace()}")]


def is_alive(mark: str) -> bool:
    """Say whether the guardian that wrote a mark lives; a process that has its number by now has another beginning."""
    _, pid, since, _ = mark.split(":", 3)
    with contextlib.suppress(psutil.Error):
        return read_start(int(pid)) == since and is_running(psutil.Process(int(pid)))
    return False


def end_marked(word: str, grace: float, family: bool = False) -> list[int]:
    """End all that carry the word in their marks, and with `family` all that descend from this process; return their numbers.

    Each gets SIGTERM once, and SIGKILL after `grace` seconds, until none is left.
    """
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
    left = {process for process, mark in find_marked() if mark.startswith(f"{word}:")}
    return [*left.union(filter(is_running, psutil.Process().children(recursive=True) if family else ()))]


def _reap_ended(main: int | None = None) -> int | None:
    """Collect the exit codes of children that have ended, orphans included; return that of `main` if it is among them."""
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
    """Run the command; return its exit code, 128 + the signal that ended it, or 143 if the guardian was asked to stop."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    stops: list[int] = []  # signals that ask the guardian to stop
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stops.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, MARK: make_mark(word)},
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # safe, because this process has a single thread
    )
    lifeline = sys.stdin.fileno()
    code = None
    while code is None and not stops:
        ready, _, _ = select.select([lifeline, bell], [], [], 5)
        if lifeline in ready and not os.read(lifeline, 1):
            stops.append(signal.SIGHUP)  # whoever started this process is gone
        if bell in ready:
            os.read(bell, 512)
        code = _reap_ended(child.pid)
    end_marked(word, grace, family=True)
    return 143 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard_command(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
