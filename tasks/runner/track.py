"""What a stage tells the world while it runs: metrics.jsonl, a progress bar, runtime facts, and a mirror in W&B (mirror.py).

Only numbers that a rerun repeats go into metrics.jsonl, because DVC hashes it; seconds and the machine go to runtime/ and W&B.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.files.step_rows import Rows, totals
from tasks.files.step_rows import replace as replace

if TYPE_CHECKING:
    from tasks.wandb_log.run import Mirror

PLAIN_SECONDS = 10  # between two lines of progress where there is no terminal


class Track:
    """The one object a stage writes its progress to. `work` is its folder for checkpoints, kept until it succeeds."""

    first = True  # of the ranks

    def __init__(self, stage: str, work: Path, *, mirror: Mirror | None = None, resume: bool = False) -> None:
        self.stage, self.work, self.resume = stage, work, resume
        self.curve = work / "metrics.jsonl"
        self.facts: dict[str, Any] = {}
        self._mirror = mirror
        self._rows, self._times = Rows(self.curve), Rows(work / "timing.jsonl")
        self.asked: bool | None = None  # to stop; None while no loop listens

    def log(self, step: int, **values: float) -> None:
        """One row of metrics.jsonl. A value that is not finite is written as null: JSON has no other word for it."""
        row = {"step": step} | {name: rounded(value) for name, value in values.items()}
        self._rows.add(row)
        if self._mirror:
            self._mirror.log(row)

    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None:
        """What a step took, by name, and the memory it was done in: timing.jsonl, since no hashed file may hold either."""
        row = {"step": step} | {f"seconds/{name}": round(value, 6) for name, value in seconds.items()} | memory
        self._times.add(row)
        if self._mirror:
            self._mirror.log(row)

    def show(self, step: int, files: Mapping[str, Path], captions: Mapping[str, str]) -> None:
        """Videos of a step, which are kept in work/samples."""
        if self._mirror:
            self._mirror.show(step, files, captions)

    def resumed(self, step: int) -> None:
        """The stage goes on from the checkpoint after `step`: later rows are made again."""
        self.facts["resumed_at"] = step
        print(f"{self.stage}: continues after step {step}", file=sys.stderr, flush=True)
        self.cut(step)

    @contextmanager
    def listen(self) -> Iterator[Callable[[], bool]]:
        """For a loop that can stop between two steps: the first SIGTERM only asks it to (tasks/runner/execute.py)."""
        self.asked = False
        try:
            yield lambda: bool(self.asked)
        finally:
            self.asked = None

    def stopped(self, step: int) -> None:
        print(f"{self.stage}: asked to stop; saved after step {step}, the same command goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(143)

    def finished(self) -> None:
        """The first rank goes on and saves the model."""

    def cut(self, step: int) -> None:
        """Drops the rows after `step`."""
        self._rows.cut(step)
        self._times.cut(step)

    def save(self, out: Path) -> None:
        """Samples and metrics.jsonl into the stage's out folder, and the same rows as metrics.csv, which is what DVC can plot."""
        if (self.work / "samples").is_dir():
            shutil.copytree(self.work / "samples", out / "samples")
        rows = self._rows.read()
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (out / "metrics.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["step"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def keep_times(self, folder: Path) -> None:
        """timing.jsonl as folder/<stage>.timing.jsonl, and its sums and highest values as facts."""
        self.facts |= totals(self._times.read())
        if self._times.file.exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(self._times.file, folder / f"{self.stage}.timing.jsonl")

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Progress:
        return Progress(self.stage, total, unit, start)

    def close(self, metrics: Mapping[str, Any] | None = None, *, exit_code: int = 0) -> None:
        if self._mirror:
            self._mirror.finish(metrics or {}, exit_code)
            self.facts |= {"wandb": self._mirror.folder} | ({"wandb_url": self._mirror.url} if self._mirror.url else {})


def rounded(value: float) -> float | int | None:
    """Six significant digits: what a reader can use, and the same text wherever it is written."""
    if isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def tail(out: Path, name: str) -> float | None:
    """Mean over the last tenth of the rows of out/metrics.jsonl that have this value: where a noisy curve has come to."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = [row[name] for row in rows if row.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


class Progress:
    """A bar with rate and time left; where nobody watches a terminal, a line now and then."""

    def __init__(self, name: str, total: int, unit: str, start: int) -> None:
        self.name, self.total, self.unit, self.start, self.done = name, total, unit, start, start
        self.began = self.said = time.monotonic()
        self.shown: dict[str, float] = {}
        self.bar: Any = None
        self.closed = False
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit=f" {unit}", desc=name, dynamic_ncols=True, smoothing=0.1)

    def update(self, n: int = 1, **shown: float) -> None:
        self.done += n
        self.shown = shown
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.said >= PLAIN_SECONDS:
            self._say()
        if self.done >= self.total:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
        else:
            self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        seconds = self.said - self.began
        rate = (self.done - self.start) / seconds if seconds else 0.0
        parts = [f"{self.name}: {self.done} of {self.total} {self.unit}s"]
        if rate:
            left = (self.total - self.done) / rate
            parts += [f"{rate:.3g} a second", f"{left:.0f} s left" if self.done < self.total else f"in {seconds:.0f} s"]
        parts += [f"{name} {value:.4g}" for name, value in self.shown.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)
