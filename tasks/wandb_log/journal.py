"""What a tracked run has told, kept in plain files while it tells it.

W&B's offline file holds nothing of the last 10 to 20 seconds before a kill (a run killed in its first seconds has an empty
one). So each row also goes here, and `cf wandb sync` completes what W&B has lost:

    runtime/journal/<run id>/run.json        who the run is; how it ended, unless it still runs or was killed
    runtime/journal/<run id>/metrics.jsonl   its rows, one line each; locked while the run lives, the kernel ends that
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

About = dict[str, Any]
ABOUT, ROWS = "run.json", "metrics.jsonl"


class Journal:
    """One run's folder, from its first moment to its last."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)
        self._rows = (folder / ROWS).open("a", buffering=1)
        fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.note()

    def row(self, values: Mapping[str, Any]) -> None:
        self._rows.write(json.dumps(values) + "\n")

    def note(self, **about: Any) -> None:
        """More about the run; never half a file."""
        self.about |= about
        partial = self.folder / f"{ABOUT}.partial"
        with partial.open("w") as file:
            file.write(json.dumps(self.about, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave an empty one under the right name
        partial.replace(self.folder / ABOUT)

    def close(self) -> None:
        self._rows.close()


def claim(root: Path, group: str, stage: str, attempt: int) -> Path:
    """A new folder, whose name is the run's id: readable, and unlike any other's, also on other machines."""
    words = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{group[-40:]}-{stage}-{attempt}").strip("-")
    folder = root / f"{words}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def earlier(root: Path, work: Path) -> About | None:
    """The attempt that this one goes on from: the last in the same working folder, unless it came to its end."""
    same = [about for about in every(root) if about.get("work") == str(work)]
    last = max(same, key=lambda about: float(about["started"]), default=None)
    return None if last is None or last.get("exit_code") == 0 else last


def every(root: Path) -> Iterator[About]:
    for file in sorted(root.glob(f"*/{ABOUT}")):
        try:
            yield json.loads(file.read_text())
        except (OSError, ValueError) as error:
            warnings.warn(f"{file} can't be read ({error}); its run is left out", stacklevel=2)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of a run that has ended; a last line that a kill left half-written is not one."""
    text = (folder / ROWS).read_text() if (folder / ROWS).exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
