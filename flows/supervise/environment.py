"""TODO: what flows.supervise.environment is for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SECRET = ("PREFECT_", "CF_ALERT_", "CF_HEARTBEAT_")  # of the environment, and none of a stage's business: there is a password in each


def environment(run: str, root: Path, repo: Path) -> dict[str, str]:
    """Of the stages: this interpreter's `python` and `dvc`, the run's name, and no password of Prefect or the alerts.

    Offline runs of W&B, and what is kept of single clips, go to the checkout that the run's worktree belongs to: they outlive the
    worktree.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(SECRET)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    outlives = {} if root == repo else {"WANDB_DIR": str(repo / "runtime"), "CF_KEPT": str(repo / "work/kept")}
    return {"CF_RUN": run, "AWS_MAX_ATTEMPTS": "3", **outlives, **kept, "PYTHONUNBUFFERED": "1", "PATH": path}
