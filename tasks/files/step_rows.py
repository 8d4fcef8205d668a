"""A file of JSON rows, one a step, that a stage goes on with after it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Rows:
    def __init__(self, file: Path) -> None:
        self.file = file
        self._continued = file.exists()

    def add(self, row: Mapping[str, Any]) -> None:
        if self._continued:  # rows of a killed run that got further than its last checkpoint
            self.cut(row["step"] - 1)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def cut(self, step: int) -> None:
        """Drops the rows after `step`, and a last row that a kill left half-written."""
        self._continued = False
        if not self.file.exists():
            return
        kept = [line for line in self.file.read_text().splitlines(keepends=True) if _is_kept(line, step)]
        replace(self.file, "".join(kept))

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


def _is_kept(line: str, step: int) -> bool:
    return line.endswith("\n") and json.loads(line)["step"] <= step


def totals(times: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of rows of times: seconds by name, and the highest of a GPU's peaks (the process's own is known without them)."""
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {"seconds": seconds}
    for row in times:
        for name in [name for name in row if name.startswith("seconds/")]:
            short = name.removeprefix("seconds/")
            seconds[short] = round(seconds.get(short, 0.0) + row[name], 6)
        if "cuda_peak_mib" in row:
            found["cuda_peak_mib"] = max(found.get("cuda_peak_mib", 0.0), row["cuda_peak_mib"])
    return found


def replace(path: Path, text: str) -> None:
    """Never half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
