"""What a stage tells the world while it runs: metrics.jsonl, a progress bar, runtime facts, and a mirror in W&B (mirror.py).

Only numbers that a rerun repeats go into metrics.jsonl, because DVC hashes it; seconds and the machine go to runtime/ and W&B.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mirror import Mirror

PLAIN_SECONDS = 10  # between two lines of progress where there is no terminal


class Track:
    """The one object a stage writes its progress to. `work` is its folder for checkpoints, kept until it succeeds."""

    def __init__(self, stage: str, work: Path, *, mirror: Mirror | None = None, resume: bool = False) -> None:
        self.stage, self.work, self.resume = stage, work, resume
        self.curve = work / "metrics.jsonl"
        self.facts: dict[str, Any] = {"seconds": {}}
        self._mirror = mirror
        self._continued = self.curve.exists()
        self.asked: bool | None = None  # to stop; None while no loop listens

    def log(self, step: int, **values: float) -> None:
        """One row of metrics.jsonl. A value that is not finite is written as null: JSON has no other word for it."""
        if self._continued:  # rows of a killed run that got further than its last checkpoint
            self.cut(step - 1)
        row = {"step": step} | {name: rounded(value) for name, value in values.items()}
        with self.curve.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._mirror:
            self._mirror.log(row)

    def time(self, **seconds: float) -> None:
        """Wall times, summed by name. Never in a hashed file."""
        for name, value in seconds.items():
            self.facts["seconds"][name] = round(self.facts["seconds"].get(name, 0.0) + value, 3)
        if self._mirror:
            self._mirror.log({f"seconds/{name}": value for name, value in seconds.items()})

    def resumed(self, step: int) -> None:
        """The stage goes on from the checkpoint after `step`: later rows are made again."""
        self.facts["resumed_at"] = step
        print(f"{self.stage}: continues after step {step}", file=sys.stderr, flush=True)
        self.cut(step)

    @contextmanager
    def listen(self) -> Iterator[Callable[[], bool]]:
        """For a loop that can stop between two steps: the first SIGTERM only asks it to (tasks/runner.py)."""
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
        """Drops the rows after `step`, and a last row that a kill left half-written."""
        self._continued = False
        if not self.curve.exists():
            return
        kept = [line for line in self.curve.read_text().splitlines(keepends=True) if _is_kept(line, step)]
        replace(self.curve, "".join(kept))

    def save(self, out: Path) -> None:
        """metrics.jsonl into the stage's out folder, and the same rows as metrics.csv, which is what DVC can plot."""
        rows = [json.loads(line) for line in self.curve.read_text().splitlines()] if self.curve.exists() else []
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (out / "metrics.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["step"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

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


def replace(path: Path, text: str) -> None:
    """Never half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def tail(out: Path, name: str) -> float | None:
    """Mean over the last tenth of the rows of out/metrics.jsonl that have this value: where a noisy curve has come to."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = [row[name] for row in rows if row.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def _is_kept(line: str, step: int) -> bool:
    return line.endswith("\n") and json.loads(line)["step"] <= step


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
