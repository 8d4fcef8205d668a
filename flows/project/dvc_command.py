"""The one place that starts DVC. Commands that may take long are built here and run by flows/supervise/command.py."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.supervise.environment import child_environment
from tasks.files.dvc_rwlock import mend_rwlock


def dvc_words(*words: str) -> list[str]:
    """Return the command line of this interpreter's DVC, which waits for a checkout that another DVC process has locked."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def run_dvc(root: Path, *words: str) -> str:
    """Run a short command of DVC and return what it prints. Raises RuntimeError with DVC's reason."""
    env = child_environment()
    if words[0] not in ("cache", "config"):  # which never read the record, so that `cf doctor` can ask them and report it as it is
        mend_rwlock(root)
    done = subprocess.run(dvc_words(*words), cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`dvc {words[0]}` failed in {root}: {find_reason((done.stderr or done.stdout).splitlines())}")
    return done.stdout


def read_config(root: Path) -> dict[str, str]:
    """Read DVC's configuration of all levels, by dotted keys: core.remote, remote.NAME.url."""
    return dict(line.split("=", 1) for line in run_dvc(root, "config", "--list").splitlines() if "=" in line)


def find_reason(lines: Sequence[str]) -> str:
    """Return the last error in DVC's output, to the end, or the last line. Above it there may be an error for every file."""
    text = [line for line in lines if line.strip() and not line.startswith("Having any troubles?")]
    last = next((at for at in range(len(text))[::-1] if "ERROR: " in text[at]), -1)
    reason = " ".join(" ".join(text[last:]).rpartition("ERROR: ")[2].split()).removeprefix("unexpected error - ")
    return reason[:500] or "without a word"


def explain_failure(lines: Sequence[str]) -> str:
    """Return why `dvc repro` of one stage failed: the last line of a command that ended badly, else DVC's own reason."""
    reason = re.sub(r"^failed to reproduce '[^']*': ", "", find_reason(lines))
    said = [line for line in lines if line.strip() and not line.startswith(("ERROR: ", "WARNING: ", "Running stage '", "> "))]
    return said[-1].strip() if said and reason.startswith("failed to run: ") else reason
