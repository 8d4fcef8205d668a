"""Which GPUs a stage has to itself: one lock file each, which the kernel frees when its last holder dies, kill -9 included.

Prefect's concurrency limits are not used for this: after a restart of the server their slots stay taken for ever.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from tasks.files.settings import read_settings

PAUSE = 0.5  # seconds between two looks at a lock that another holds
SAY_EVERY = 60.0
DEVICES = Path("/dev")


def lock_folder() -> Path:
    """Shared by all checkouts of this user on this machine; its name is in there, because a home may be shared by machines."""
    return read_settings().gpu_locks or Path.home() / ".cache/cf" / (re.sub(r"[^\w-]", "_", platform.node()) or "here")


def list_gpus() -> list[int]:
    """Numbers of the GPUs that this process may give away: CF_GPUS of them, or those it was given, or all of the machine."""
    count, visible = read_settings().gpus, os.environ.get("CUDA_VISIBLE_DEVICES")
    if count is not None:
        return list(range(count))
    if visible is not None:
        named = [one.strip() for one in visible.split(",") if one.strip() not in ("", "-1")]
        if not all(one.isdecimal() for one in named):
            raise ValueError(f"CUDA_VISIBLE_DEVICES is {visible}; name GPUs by their numbers, since their locks are numbered")
        return sorted({int(one) for one in named})
    # CUDA counts those that are there: a container that is given GPU 3 has /dev/nvidia3, and calls it 0
    return list(range(len(list(DEVICES.glob("nvidia[0-9]*")))))


@contextmanager
def hold_gpus(count: int, line: Callable[[str], None]) -> Iterator[list[int]]:
    """`count` GPUs, lowest free numbers first, for as long as the block lasts; waits for them and says so."""
    with lock_gpus(count, line) as held:
        yield list(held)


@contextmanager
def lock_gpus(count: int, line: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> Iterator[dict[int, int]]:
    """The same, with the open file of each lock: whoever inherits it keeps the lock beyond this process.

    Choice: one process at a time collects locks, under a lock of its own, and keeps what it has until it has all. So a stage
    that wants eight can't be passed for ever by stages that want one, and two that want eight can't hold four each.
    """
    known = list_gpus()
    if count > len(known):
        way = "lower meta.cf.gpus in dvc.yaml, or run it on a machine that has them"
        raise ValueError(f"{count} GPUs are asked for, and this machine gives away {len(known)}; {way} (CF_GPUS states how many there are)")
    with ExitStack() as open_files:
        held: dict[int, int] = {}
        if count:
            with ExitStack() as turn:
                _wait_until(lambda: _take_lock(lock_folder() / "gpus.lock", turn) is not None, line, "its turn to take GPUs", stop)
                _wait_until(lambda: _collect_locks(held, count, known, open_files), line, f"{count} of GPUs {known}", stop)
            held = dict(sorted(held.items()))
            line(f"GPUs {', '.join(map(str, held))}")
        yield held


def _collect_locks(held: dict[int, int], count: int, known: list[int], open_files: ExitStack) -> bool:
    for number in known:
        if len(held) < count and number not in held:
            taken = _take_lock(lock_folder() / f"gpu{number}.lock", open_files)
            held |= {} if taken is None else {number: taken}
    return len(held) == count


def _take_lock(path: Path, open_files: ExitStack) -> int | None:
    """The file is never removed: a lock on a removed file would be a lock that nobody else sees."""
    file = _open_shared(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    open_files.enter_context(file)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")  # for the person who looks who has it; the lock is the kernel's
    file.flush()
    return file.fileno()


def _open_shared(path: Path) -> IO[str]:
    """For whoever else shares the folder too, whatever the umask of the one who makes the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.fchmod(made := os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), 0o666)
            os.close(made)
        return path.open("r+")
    except PermissionError:
        raise ValueError(f"{path} is another user's: `chmod a+rw` it as that one, or state a folder of your own in CF_GPU_LOCKS") from None


def _wait_until(ready: Callable[[], bool], line: Callable[[str], None], what: str, stop: Callable[[], bool]) -> None:
    said = -SAY_EVERY
    while not ready():
        if stop():
            raise InterruptedError(f"stopped while waiting for {what}")
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            line(f"waits for {what}")
        time.sleep(PAUSE)


def find_holders() -> dict[int, int | None]:
    """GPU -> process that holds its lock, None where it is free. For `cf doctor`."""
    found: dict[int, int | None] = {}
    for number in list_gpus():
        path = lock_folder() / f"gpu{number}.lock"
        with ExitStack() as open_files:
            free = not path.exists() or _is_free(path, open_files)
            found[number] = None if free else int(path.read_text().strip() or 0)
    return found


def _is_free(path: Path, open_files: ExitStack) -> bool:
    file = open_files.enter_context(path.open())
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
