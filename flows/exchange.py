"""What a run of the pipeline takes from other machines before its stages, and gives to them afterwards (flows/project/dvc_remote.py)."""

from __future__ import annotations

import re
from pathlib import Path

from prefect import get_run_logger

from flows.project import dvc_remote


def there(root: Path) -> bool:
    """A remote that is away is no reason not to run: what it has is made again. One that is set up wrong is."""
    try:
        get_run_logger().info(f"takes what {dvc_remote.check(root)} has")
    except dvc_remote.Away as error:
        get_run_logger().warning(f"{error}; everything is made here")
        return False
    return True


def give(root: Path, failed: RuntimeError | None) -> None:
    """What has finished, also when another stage failed: the run then fails by that one's sentence, and not by the push's."""
    state = dvc_remote.pushed(root, return_state=True)
    if not state.is_completed() and not failed:
        said = re.sub(r"^Task run encountered an exception \w+: ", "", state.message or "it did not end")
        raise RuntimeError(f"the stages are finished and not sent: {said}; `cf remote push` in {root} sends them")
