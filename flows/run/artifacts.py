"""What a run shows in Prefect beside its states, as Prefect's artifacts: metrics, links, and how far the current stage is.

No artifact is worth a run: whatever fails here is a line in the log, written by `complain`.
"""

import contextvars
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import artifacts as prefect_artifacts

from tasks.files.json_lines import read_json_object
from tasks.files.key_numbers import read_key_numbers
from tasks.files.settings import read_settings
from tasks.files.trees import list_nodes

UPDATE_EVERY = 2.0  # seconds between two updates of a bar
STEPS = re.compile(r"(?P<stage>[\w@./:-]+): (?P<done>\d+) of (?P<total>\d+) \w+")

Complain = Callable[[str], object]


def artifact_key(text: str) -> str:
    """Return the text as a key that Prefect takes: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class ProgressBar:
    """Progress of one stage, read from its lines (`stage2: 30 of 150 steps, ...`).

    The server is told in a thread, because a stage stands still while its output is not read.
    """

    def __init__(self, stage: str, complain: Complain) -> None:
        self.stage, self.complain = stage, complain
        self.artifact: UUID | None = None
        self.last_update, self.last_line = 0.0, ""
        self.update: Future[None] | None = None
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="progress")

    def read_line(self, line: str) -> None:
        """Move the bar if the line names a step of this stage; at most every two seconds, and always at the last step."""
        step = STEPS.match(line)
        # an item of a foreach, `evaluate@short`, prints the name of its task, `evaluate`
        if not step or step["stage"] not in (self.stage, self.stage.split("@")[0]) or not int(step["total"]):
            return
        self.last_line = line
        share = min(1.0, int(step["done"]) / int(step["total"]))
        due = share == 1.0 or time.monotonic() - self.last_update >= UPDATE_EVERY
        if due and (self.update is None or self.update.done()):
            self.last_update = time.monotonic()
            self._submit(100 * share, line)

    def close(self, completed: bool) -> None:
        """End the updates; fill the bar of a completed stage, whose last line may have come between two updates."""
        if completed and self.last_line:
            self._submit(100.0, self.last_line)
        self.executor.shutdown(wait=False)

    def _submit(self, percent: float, line: str) -> None:
        self.update = self.executor.submit(contextvars.copy_context().run, self._send, percent, line)

    def _send(self, percent: float, line: str) -> None:
        if self.artifact is None:
            create, key = prefect_artifacts.create_progress_artifact, f"progress-{artifact_key(self.stage)}"
            self.artifact = _show(self.complain, create, percent, key=key, description=line)
        else:
            _show(self.complain, prefect_artifacts.update_progress_artifact, self.artifact, percent, description=line)


def show_results(root: Path, run: str, states: Mapping[str, str], about: str, complain: Complain) -> None:
    """Show what each stage did, all metrics, and links to the report and to W&B's runs; `about` is what was asked for."""
    places = wandb_places(root)
    create_link, summary = prefect_artifacts.create_link_artifact, _summary_text(root, run, states, about, places)
    _show(complain, prefect_artifacts.create_markdown_artifact, summary, key="run", description=f"run {run}")
    if text := _metrics_text(root):
        _show(complain, prefect_artifacts.create_markdown_artifact, text, key="metrics", description=f"metrics of run {run}")
    report = root / "reports/report.html"
    if report.exists():
        server = (read_settings().reports or "").rstrip("/")
        link = f"{server}/{root.name}/report.html" if server and root.parent.name == ".runs" else report.as_uri()
        _show(complain, create_link, link, "report", key="report", description=f"the report of run {run}, {report}")
    for stage, place in places.items():
        if place.startswith(("http://", "https://")):
            _show(complain, create_link, place, f"{stage} of run {run} in W&B", key=f"wandb-{artifact_key(stage)}")


def show_table(rows: list[dict[str, Any]], key: str, description: str, complain: Complain) -> None:
    """Show rows of equal keys as a table."""
    _show(complain, prefect_artifacts.create_table_artifact, rows, key=key, description=description)


def _show(complain: Complain, create: Callable[..., Any], *values: object, **options: object) -> Any:
    try:
        return create(*values, **options)
    except Exception as error:
        complain(f"an artifact is not shown: {' '.join(str(error).split())[:200]}")
        return None


def _metrics_text(root: Path) -> str:
    """Return the key numbers as a table, and below it all metrics, folded where there are key numbers; empty without any metrics.

    The fold is HTML in one block, because Prefect's page draws each block of Markdown by itself: a table of its own is never folded.
    """
    metrics = {file.stem: read_json_object(file) for file in sorted((root / "metrics").glob("*.json"))}
    values = [(stage, *node) for stage, tree in metrics.items() for node in list_nodes(tree) if not isinstance(node[1], Mapping)]
    numbers = {label: value for label, value in read_key_numbers(root).items() if value is not None}
    if not numbers:
        return _markdown_table(("stage", "metric", "value"), values) if values else ""
    key_table = _markdown_table(("number", "value"), [(label, f"{value:.4g}") for label, value in numbers.items()])
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in [("stage", "metric", "value"), *values]
    )
    return "\n".join([key_table, "", f"<details><summary>all {len(values)} metrics</summary><table>{rows}</table></details>"])


def _summary_text(root: Path, run: str, states: Mapping[str, str], about: str, places: Mapping[str, str]) -> str:
    lines = [f"# Run {run}", "", *([about, ""] if about else []), f"In `{root}`."]
    if root.parent.name == ".runs":
        branch = f"run/{root.name}"
        lines[-1] += f" `git show {branch}:params.yaml` shows all parameters, `cf runs open {root.name} DIR` brings it back later."
    shown = {stage: f"[run]({place})" if place.startswith("http") else f"`{place}`" for stage, place in places.items()}
    lines += ["", _markdown_table(("stage", "state", "W&B"), [(stage, state, shown.get(stage, "")) for stage, state in states.items()])]
    if any(not place.startswith("http") for place in places.values()):
        lines += ["", "W&B's runs were kept on this machine; `cf wandb sync` sends them, `wandb leet` shows them here."]
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def wandb_places(root: Path) -> dict[str, str]:
    """Return each stage's run in W&B: its URL if it was online, else its folder on this machine."""
    facts = {file.stem: read_json_object(file) for file in sorted((root / "runtime").glob("*.json"))}
    places = {stage: values.get("wandb_url") or values.get("wandb") for stage, values in facts.items()}
    return {stage: str(place) for stage, place in places.items() if place}
