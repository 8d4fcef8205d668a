"""The process around a stage: an environment that repeats results, and which errors are written for a person."""

import errno
import gc
import linecache
import os
import sys
import time
import traceback

from tasks.params.yaml_file import Refused

BEGAN = time.time()  # of this process
# What must be set before Python or the C library starts, and therefore costs a second start.
FIXED = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
    # Freed tensors stay with the process. Handing 24 MB back to the kernel and taking it again at each step of a loop
    # cost three times the arithmetic in it.
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
}


def fix_environment() -> None:
    """Start this process again, once, with the variables of FIXED."""
    if any(os.environ.get(name) != value for name, value in FIXED.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **FIXED})


def pause_collection() -> None:
    """Collect no garbage while a process imports its libraries, because that is a search of up to 800,000 objects which finds none."""
    gc.disable()


def resume_collection() -> None:
    """Collect garbage again where `pause_collection` ended it, but never among the objects that are there by now.

    These are the libraries' own, which live as long as the process. Without this a search of all of them belongs to the end of
    every process, and to a part of a stage's work.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def is_deliberate(error: BaseException) -> bool:
    """Say whether the error's message is written for a person.

    That is a refusal, a full disk, or a ValueError that a `raise` in our own code made. The same types out of a library are
    bugs, which keep their traceback.
    """
    if isinstance(error, Refused) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return True
    if not isinstance(error, ValueError | FileNotFoundError | NotImplementedError):
        return False
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    is_ours = frame.f_globals.get("__name__", "").startswith(("tasks.", "cf_model.", "flows."))
    return is_ours and linecache.getline(frame.f_code.co_filename, number).lstrip().startswith("raise ")
