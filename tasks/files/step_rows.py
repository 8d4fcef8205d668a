"""A stage's rows of numbers, one JSON line a step, which a new attempt continues after the stage was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.files.atomic import write_atomically
from tasks.files.json_lines import Row, read_json_lines


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
            file.write(json.dumps(row) + "\n")

    def cut(self, step: int) -> None:
        """Remove the rows after `step`, and a last row that a kill left half-written."""
        self._from_earlier_attempt = False
        if self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            write_atomically(self.file, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))

    def read(self) -> list[Row]:
        return read_json_lines(self.file, missing_ok=True)


def sum_step_times(times: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum rows of times: {"seconds": {name: seconds}}, and "cuda_peak_mib", the highest of the rows that have a GPU's peak."""
    seconds: dict[str, float] = {}
    sums: dict[str, Any] = {"seconds": seconds}
    for row in times:
        for name in [name for name in row if name.startswith("seconds/")]:
            short = name.removeprefix("seconds/")
            seconds[short] = round(seconds.get(short, 0.0) + row[name], 6)
        if "cuda_peak_mib" in row:
            sums["cuda_peak_mib"] = max(sums.get("cuda_peak_mib", 0.0), row["cuda_peak_mib"])
    return sums
