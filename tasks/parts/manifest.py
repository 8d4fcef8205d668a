"""Reading the JSON-lines files that stages hand to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accepted_rows(path: Path, split: str) -> list[dict[str, Any]]:
    """The manifest's clips of a split, in its order."""
    return [row for row in read_rows(path) if row["kept"] and row["split"] == split]


def write_rows(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
