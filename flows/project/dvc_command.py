"""The one place that starts DVC. Commands that may take long are built here and run by flows/supervise/command.py."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.supervise.environment import child_environment


def dvc_words(*words: str) -> list[str]:
    """Return the command line of this interpreter's DVC, which waits for a checkout that another DVC process has locked."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def run_dvc(root: Path, *words: str) -> str:
    """Run a short command of DVC and return what it prints. Raises RuntimeError with DVC's reason."""
    env = child_environment()
    done = subprocess.run(dvc_words(*words), cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`dvc {words[0]}` failed in {root}: {find_reason((done.stderr or done.stdout).splitlines())}")
    return done.stdout


def read_config(root: Path) -> dict[str, str]:
    """Read DVC's configuration of all levels, by dotted keys: core.remote, remote.NAME.url."""
    return dict(line.split("=", 1) for line in run_dvc(root, "config", "--list").splitlines() if "=" in line)


def find_reason(lines: Sequence[str]) -> str:
    """Return the last error among lines of DVC's output, or the last line. Above it there may be an error for every file."""
    errors = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
    last = next(iter(errors[::-1]), "") or next((line for line in reversed(lines) if line.strip()), "without a word")
    return " ".join(last.removeprefix("unexpected error - ").split())[:500]
