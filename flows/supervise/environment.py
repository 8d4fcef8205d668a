"""The environment of processes that flows start: this interpreter's programs first, and no password that is the flows' alone."""

import os
import sys
from pathlib import Path

SECRETS = ("PREFECT_", "CF_ALERT_", "CF_HEARTBEAT_")  # beginnings of names; each of these variables may hold a password


def child_environment() -> dict[str, str]:
    """Return the environment of a DVC or git process.

    A request to S3 is tried three times instead of five, with growing pauses, because the task that pushes tries again itself.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(SECRETS)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"AWS_MAX_ATTEMPTS": "3", "DVC_NO_ANALYTICS": "1", **inherited, "PYTHONUNBUFFERED": "1", "PATH": path}


def stage_environment(run: str, root: Path, repo: Path) -> dict[str, str]:
    """Return the environment of the stages of a run: the run's name, and folders that must outlive the run's worktree `root`.

    These are offline runs of W&B and results for single clips; they go to `repo`, the checkout that the worktree belongs to.
    """
    lasting = {} if root == repo else {"WANDB_DIR": str(repo / "runtime"), "CF_KEPT": str(repo / "work/kept")}
    return {"CF_RUN": run, **lasting, **child_environment()}
