"""What a run shows in Prefect beside its states: metrics, links, and how far the current stage is. Artifacts, by Prefect's word.

None of it is worth a run: whatever goes wrong here is a line in the log.
"""

from __future__ import annotations

import contextvars
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

EVERY = 2.0  # seconds between two updates of a bar
STEPS = re.compile(r"(?P<stage>[\w@./:-]+): (?P<done>\d+) of (?P<total>\d+) \w+")


def key(text: str) -> str:
    """Prefect's keys are lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Progress:
    """A bar from the lines that a stage says (`stage2: 30 of 150 steps, ...`). The server is told in a thread of its own: a stage
    whose lines nobody reads would stand still."""

    def __init__(self, stage: str, complain: Callable[[str], object]) -> None:
        self.stage, self.complain = stage, complain
        self.bar: UUID | None = None
        self.said, self.last = 0.0, ""
        self.told: Future[None] | None = None
        self.teller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="progress")

    def line(self, said: str) -> None:
        found = STEPS.match(said)
        # foreach stages speak with the name of their task
        if not found or found["stage"] not in (self.stage, self.stage.split("@")[0]) or not int(found["total"]):
            return
        self.last = said
        whole = int(found["done"]) >= int(found["total"])
        if (whole or time.monotonic() - self.said >= EVERY) and (self.told is None or self.told.done()):
            self.said = time.monotonic()
            self._tell(100 * min(1.0, int(found["done"]) / int(found["total"])), said)

    def close(self, well: bool) -> None:
        """Full when the stage went well, also where the last line fell between two updates."""
        if well and self.last:
            self._tell(100.0, self.last)
        self.teller.shutdown(wait=False)

    def _tell(self, percent: float, said: str) -> None:
        self.told = self.teller.submit(contextvars.copy_context().run, self._send, percent, said)

    def _send(self, percent: float, said: str) -> None:
        try:
            if self.bar is None:
                self.bar = cast(UUID, create_progress_artifact(percent, key=f"progress-{key(self.stage)}", description=said))
            else:
                update_progress_artifact(self.bar, percent, description=said)
        except Exception as error:
            self.complain(f"progress is not shown: {' '.join(str(error).split())[:200]}")


def results(root: Path, run: str, states: Mapping[str, str], complain: Callable[[str], object]) -> None:
    """After the stages: what each did, all metrics in one table, where the report and W&B's runs are."""
    name = os.environ.get("CF_REPORTS", "").rstrip("/")
    report = root / "reports/report.html"
    link = f"{name}/{root.name}/report.html" if name and root.parent.name == ".runs" else report.as_uri()
    shown: list[Callable[[], object]] = [lambda: create_markdown_artifact(_summary(root, run, states), key="run", description=f"run {run}")]
    if rows := list(_metrics(root)):
        shown.append(lambda: create_table_artifact(rows, key="metrics", description=f"metrics of run {run}"))
    if report.exists():
        shown.append(lambda: create_link_artifact(link, "report", key="report", description=f"the report of run {run}, {report}"))
    for stage, where in trackers(root).items():
        if where.startswith(("http://", "https://")):
            words = f"{stage} of run {run} in W&B"
            shown.append(partial(create_link_artifact, where, words, key=f"wandb-{key(stage)}"))
    for show in shown:
        try:
            show()
        except Exception as error:
            complain(f"an artifact is not shown: {' '.join(str(error).split())[:200]}")


def table(rows: list[dict[str, Any]], what: str, description: str, complain: Callable[[str], object]) -> None:
    try:
        create_table_artifact(rows, key=what, description=description)
    except Exception as error:
        complain(f"an artifact is not shown: {' '.join(str(error).split())[:200]}")


def _summary(root: Path, run: str, states: Mapping[str, str]) -> str:
    lines = [f"# Run {run}", "", f"In `{root}`; `git log -1 -p` there shows its parameters, `dvc repro` repeats it.", ""]
    lines += ["| stage | state | W&B |", "|---|---|---|"]
    where = trackers(root)
    for stage, state in states.items():
        place = where.get(stage, "")
        lines.append(f"| {stage} | {state} | {f'[run]({place})' if place.startswith('http') else f'`{place}`' if place else ''} |")
    if any(place and not place.startswith("http") for place in where.values()):
        lines += ["", "W&B's runs were kept on this machine; `cf wandb sync` sends them, `wandb leet` shows them here."]
    return "\n".join(lines)


def trackers(root: Path) -> dict[str, str]:
    """Stage -> its run in W&B, by URL where it was online and by folder where it was not."""
    found = {}
    for file in sorted((root / "runtime").glob("*.json")):
        facts = _read(file)
        if where := facts.get("wandb_url") or facts.get("wandb"):
            found[file.stem] = str(where)
    return found


def _metrics(root: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((root / "metrics").glob("*.json")):
        for name, value in _flat(_read(file)):
            yield {"stage": file.stem, "metric": name, "value": value}


def _flat(values: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # being written, or no file of ours
        return {}
    return found if isinstance(found, dict) else {}
