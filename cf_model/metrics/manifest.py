"""A manifest: which videos are scored, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUITE = "videos"  # of rows that name none


def check_rows(rows: list[dict[str, Any]], folder: Path, texts: Mapping[str, str], manifest: str, prompts: str) -> list[dict[str, Any]]:
    """Return the rows of a manifest with each prompt_id's text from `texts`. Raises ValueError for a row that contradicts itself.

    `manifest` and `prompts` name the two files in the sentence.
    """
    seen = set[str]()
    taken: dict[tuple[Any, ...], str] = {}  # suite, system, prompt and seed -> file
    for number, row in enumerate(rows, 1):
        name, rate = row.get("file"), row.get("fps")
        where = f"{manifest} line {number}"
        if not isinstance(name, str):
            raise ValueError(f'{where} names no file; every line needs one, as "file"')
        if name in seen:
            raise ValueError(f"{where} names {name} a second time; keep one of the two")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where} names {name}, which is outside {folder}; name a file in it")
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < 1000):
            raise ValueError(f"{where}: fps is {rate!r}; it must be the file's frames a second, or left out")
        if any(not isinstance(row.get(key, ""), str) for key in ("system", "suite", "prompt", "prompt_id")):
            raise ValueError(f"{where}: system, suite, prompt and prompt_id are texts; write them in quotes")
        if not isinstance(row.get("seed", 0), int):
            raise ValueError(f"{where}: seed is {row['seed']!r}; it must be a whole number, or left out")
        if (key := row.get("prompt_id")) is not None:
            if key not in texts:
                raise ValueError(f"{where}: prompt_id is {key!r}, which {prompts} does not hold; add it there")
            row.setdefault("prompt", texts[key])
            place = (row.get("suite", SUITE), row.get("system"), key, row.get("seed"))
            if row.get("seed") is not None and (other := taken.setdefault(place, name)) != name:
                video = f"prompt {key!r}, seed {row['seed']}" + (f" of {row['system']}" if row.get("system") else "")
                raise ValueError(f"{where} names {name} for {video}, and so does {other}; keep one of the two")
        seen.add(name)
    if not rows:
        raise ValueError(f"{manifest} names no video; give it a line for each")
    return rows


def describe_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row of a manifest says of its video, as cells say it."""
    return {name: row.get(name) for name in ("system", "prompt", "prompt_id", "seed")} | {
        "suite": row.get("suite", SUITE),
        "file": row["file"],
    }
