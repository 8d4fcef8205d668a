"""TODO: what flows.project.dvc_command is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flows.supervise.environment import environment


def run_dvc(root: Path, *words: str) -> None:
    """Run a short command of DVC. Raises RuntimeError with what DVC complains of."""
    variables = environment("dvc", root, root)
    command_line = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command_line, cwd=root, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        complaint = " ".join((done.stderr or done.stdout).split()) or "it said nothing"
        raise RuntimeError(f"`dvc {words[0]}` failed: {complaint[-500:]}")
