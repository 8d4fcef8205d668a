"""What a stage records while it runs: metrics.jsonl, a progress bar, runtime facts, and a mirror in W&B (tasks/wandb_log).

Only numbers that a rerun repeats go into metrics.jsonl, because DVC hashes it; seconds and the machine go to runtime/ and W&B.
"""

import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cf_model.evaluate.trouble import CurveRule, CurveWatch
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import Row, dump_json_lines, read_json_lines
from tasks.files.words import count_things
from tasks.wandb_log.run import WandbRun

PLAIN_SECONDS = 10  # between two lines of progress where there is no terminal


class Progress:
    """A count with its rate and the time left on stderr: a bar in a terminal, lines elsewhere; `hidden` shows nothing."""

    def __init__(self, name: str, total: int, unit: str, start: int, *, hidden: bool = False) -> None:
        self.name, self.total, self.unit, self.start, self.done = name, total, unit, start, start
        self.began = self.printed = time.monotonic()
        self.values: dict[str, float] = {}
        self.bar: Any = None
        self.closed = hidden
        if sys.stderr.isatty() and not hidden:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit=f" {unit}", desc=name, dynamic_ncols=True, smoothing=0.1)

    def update(self, n: int = 1, **values: float) -> None:
        """Count `n` more units, and show the latest values beside the count."""
        self.done += n
        self.values = values
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS and not self.closed:
            self._print_line()
        if self.done >= self.total:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
        else:
            self._print_line()

    def _print_line(self) -> None:
        self.printed = time.monotonic()
        seconds = self.printed - self.began
        rate = (self.done - self.start) / seconds if seconds else 0.0
        parts = [f"{self.name}: {self.done} of {count_things(self.total, self.unit)}"]
        if rate:
            left = (self.total - self.done) / rate
            parts += [f"{rate:.3g} a second", f"{left:.0f} s left" if self.done < self.total else f"in {seconds:.0f} s"]
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


class StepRows:
    """The file of a stage's rows, such as metrics.jsonl. A killed attempt may have written rows after its last checkpoint: the first
    row that the next attempt adds removes those of the same and of later steps.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._from_earlier_attempt = file.exists()

    def add(self, row: Mapping[str, Any]) -> None:
        if self._from_earlier_attempt:
            self.cut(row["step"] - 1)
        with self.file.open("a") as file:
            file.write(dump_json_lines([row]))

    def cut(self, step: int) -> None:
        """Remove the rows after `step`, and a last row that a kill left half-written."""
        self._from_earlier_attempt = False
        if self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            write_atomically(self.file, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))

    def read(self) -> list[Row]:
        return read_json_lines(self.file, missing_ok=True)


class Track:
    """The record of one stage. `work` is the folder for its checkpoints, which a success removes."""

    first = True  # whether this process is the first of the ranks, which writes

    def __init__(
        self, stage: str, work: Path, *, mirror: WandbRun | None = None, resume: bool = False, rules: Sequence[CurveRule] = ()
    ) -> None:
        self.stage, self.work, self.resume = stage, work, resume
        self.watch = CurveWatch(rules)
        self.curve = work / "metrics.jsonl"
        self.facts: dict[str, Any] = {}
        self._mirror = mirror
        self._rows, self._times = StepRows(self.curve), StepRows(work / "timing.jsonl")
        self._shown = StepRows(work / "shown.jsonl")
        self.stop_requested: bool | None = None  # whether the loop was asked to stop; None while no loop can stop between two steps

    def log(self, step: int, **values: float) -> None:
        """Write a row of metrics.jsonl. A value that is not finite becomes null, because JSON knows neither NaN nor infinity."""
        row = {"step": step} | {name: round_value(value) for name, value in values.items()}
        self._rows.add(row)
        for sentence in self.watch.check(row):
            print(f"{self.stage}: {sentence}; docs/training.md, Trouble, says what to do", file=sys.stderr, flush=True)
        if self._mirror:
            self._mirror.log(row)

    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None:
        """Write the seconds of a step, by name, and its memory into timing.jsonl, because no file that DVC hashes may hold them."""
        row = {"step": step} | {f"seconds/{name}": round(value, 6) for name, value in seconds.items()} | memory
        self._times.add(row)
        if self._mirror:
            self._mirror.log(row)

    def show(self, step: int, files: Mapping[str, Path], captions: Mapping[str, str]) -> None:
        """Show the videos of a step in W&B; the files stay in work/samples."""
        if self._mirror:
            self._shown.add({"step": step, "files": {key: str(file) for key, file in files.items()}, "captions": dict(captions)})
            self._mirror.show(step, files, captions)

    def resumed(self, step: int) -> None:
        """Record that the stage continues from the checkpoint after `step`, and drop later rows: they are computed again."""
        self.facts["resumed_at"] = step
        print(f"{self.stage}: continues after step {step}", file=sys.stderr, flush=True)
        self.cut(step)
        for row in self._rows.read():  # what these rows broke was said by the attempt before
            self.watch.check(row)
        if self._mirror:
            self._mirror.replay(self._rows.read(), self._times.read(), self._shown.read())

    @contextmanager
    def listen(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that says whether to stop, for a loop that can stop between two steps: the first SIGTERM only asks it to."""
        self.stop_requested = False
        try:
            yield lambda: bool(self.stop_requested)
        finally:
            self.stop_requested = None

    def stopped(self, step: int) -> None:
        """End the process with code 143, after the loop has saved its step."""
        print(f"{self.stage}: asked to stop; saved after step {step}, the same command goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(143)

    def finished(self) -> None:
        """Called after the last step. The first rank continues and saves the model; tasks/runner/ranks.py ends the others here."""

    def cut(self, step: int) -> None:
        """Drop the rows after `step`."""
        for rows in (self._rows, self._times, self._shown):
            rows.cut(step)

    def save(self, out: Path) -> None:
        """Copy samples and metrics.jsonl into the stage's out folder, and write the rows as metrics.csv too, because DVC plots that."""
        if (self.work / "samples").is_dir():
            shutil.copytree(self.work / "samples", out / "samples")
        rows = self._rows.read()
        (out / "metrics.jsonl").write_text(dump_json_lines(rows))
        with (out / "metrics.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["step"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def save_times(self, folder: Path) -> None:
        """Copy timing.jsonl to folder/<stage>.timing.jsonl, and add to the facts the sum of each kind of seconds and the GPU's peak."""
        times, seconds = self._times.read(), dict[str, float]()
        for row in times:
            for name in [name.removeprefix("seconds/") for name in row if name.startswith("seconds/")]:
                seconds[name] = round(seconds.get(name, 0.0) + row[f"seconds/{name}"], 6)
        peaks = [row["cuda_peak_mib"] for row in times if "cuda_peak_mib" in row]
        self.facts |= {"seconds": seconds} | ({"cuda_peak_mib": max(peaks)} if peaks else {})
        if self._times.file.exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(self._times.file, folder / f"{self.stage}.timing.jsonl")

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Progress:
        return Progress(self.stage, total, unit, start)

    def close(self, metrics: Mapping[str, Any] | None = None, *, exit_code: int = 0) -> None:
        if self._mirror:
            self._mirror.finish(metrics or {}, exit_code)
            self.facts |= {"wandb": self._mirror.folder} | ({"wandb_url": self._mirror.url} if self._mirror.url else {})


def round_value(value: float) -> float | int | None:
    """Round to six significant digits, the precision of every number that is written; None for a value that is not finite."""
    if isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def mean_of_tail(out: Path, name: str) -> float | None:
    """Average a value over the last tenth of those rows of out/metrics.jsonl that have it, because single steps are noisy."""
    values = [row[name] for row in read_json_lines(out / "metrics.jsonl") if row.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def list_means_of_tail(out: Path, names: Sequence[str]) -> dict[str, float]:
    """Average those of the values that some row of out/metrics.jsonl has, each as mean_of_tail does."""
    return {name: mean for name in names if (mean := mean_of_tail(out, name)) is not None}
