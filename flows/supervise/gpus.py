"""Which GPUs a stage has to itself: one lock file a GPU, which the kernel frees when its last holder dies, kill -9 included.

Prefect's concurrency limits are not used for this, because after a restart of the server their slots stay taken for ever.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tasks.files.locks import read_holder, try_lock, write_holder
from tasks.files.settings import read_settings
from tasks.files.words import count_things

PAUSE = 0.5  # seconds between two attempts to take a lock
SAY_EVERY = 60.0  # seconds between two lines of a wait
DEVICES = Path("/dev")
Line = Callable[[str], None]


def lock_folder() -> Path:
    """Return the folder of the locks, which all checkouts of this user on this machine share.

    The machine's name is part of the path, because machines may share a home.
    """
    return read_settings().gpu_locks or Path.home() / ".cache/cf" / (re.sub(r"[^\w-]", "_", platform.node()) or "here")


def list_gpus() -> list[int]:
    """Return the numbers of the GPUs that this process may give away: CF_GPUS of them, those it may see, or all of the machine."""
    count, visible = read_settings().gpus, os.environ.get("CUDA_VISIBLE_DEVICES")
    if count is not None:
        return list(range(count))
    if visible is not None:
        numbers = [word.strip() for word in visible.split(",") if word.strip() not in ("", "-1")]
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"CUDA_VISIBLE_DEVICES is {visible}; name GPUs by their numbers, since their locks are numbered")
        return sorted({int(number) for number in numbers})
    # CUDA counts those that are there: a container that is given GPU 3 has /dev/nvidia3, and calls it 0
    return list(range(len(list(DEVICES.glob("nvidia[0-9]*")))))


@contextmanager
def lock_gpus(count: int, line: Line, stop: Callable[[], bool] = lambda: False) -> Iterator[dict[int, int]]:
    """Lock `count` GPUs, lowest free numbers first, for as long as the block lasts; wait for them and say so to `line`.

    Yield GPU -> handle of its lock, which a child process may inherit to keep the lock. Raises ValueError if the machine has fewer
    GPUs, and InterruptedError once `stop` says so.

    Choice: one process at a time collects locks, under a lock of its own, and keeps what it has until it has all. So a stage
    that wants eight can't be passed for ever by stages that want one, and two that want eight can't hold four each.
    """
    numbers = list_gpus()
    if count > len(numbers):
        problem = f"a stage asks for {count_things(count, 'GPU')}, and this machine gives away {len(numbers)}"
        way = "lower meta.cf.gpus in dvc.yaml, or run it on a machine that has them"
        raise ValueError(f"{problem}; {way} (CF_GPUS states how many it has)")
    locks: dict[int, int] = {}
    with ExitStack() as files:

        def collect() -> bool:
            for number in numbers:
                if len(locks) < count and number not in locks and (handle := _take_lock(f"gpu{number}", files)) is not None:
                    locks[number] = handle
            return len(locks) == count

        if count:
            with ExitStack() as turn:
                _wait_until(lambda: _take_lock("gpus", turn) is not None, line, "its turn to take GPUs", stop)
                _wait_until(collect, line, f"{count} of GPUs {numbers}", stop)
            line(f"GPUs {', '.join(map(str, sorted(locks)))}")
        yield dict(sorted(locks.items()))


def _take_lock(name: str, files: ExitStack) -> int | None:
    """Lock NAME.lock until `files` closes; return the file's handle, or None while another process holds it.

    Every user of the folder may open the file, whatever the umask of the process that makes it.
    """
    path = lock_folder() / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.fchmod(handle := os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), 0o666)
            os.close(handle)
        file = try_lock(path)
    except PermissionError:
        raise ValueError(f"{path} is another user's: `chmod a+rw` it as that one, or state a folder of your own in CF_GPU_LOCKS") from None
    if not file:
        return None
    write_holder(files.enter_context(file), f"{os.getpid()}\n")  # for a person who looks; the lock is the kernel's
    return file.fileno()


def _wait_until(ready: Callable[[], bool], line: Line, what: str, stop: Callable[[], bool]) -> None:
    last_line = -SAY_EVERY
    while not ready():
        if stop():
            raise InterruptedError(f"stopped while waiting for {what}")
        if time.monotonic() - last_line >= SAY_EVERY:
            last_line = time.monotonic()
            line(f"waits for {what}")
        time.sleep(PAUSE)


def find_holders() -> dict[int, int | None]:
    """Return the process that holds the lock of each GPU, None where it is free. For `cf doctor`."""
    locks = {number: read_holder(lock_folder() / f"gpu{number}.lock") for number in list_gpus()}
    return {number: int(text.strip() or 0) if held else None for number, (held, text) in locks.items()}
