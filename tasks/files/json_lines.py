"""Files of JSON objects: one a line, as in metrics.jsonl, index.jsonl and the manifest, or one a file, as in metrics/*.json."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.files.atomic import write_atomically
from tasks.params.yaml_file import Refused

Row = dict[str, Any]


def read_json_lines(path: Path, *, missing_ok: bool = False, growing: bool = False) -> list[Row]:
    """Read the rows of a file, in its order; blank lines are skipped.

    `missing_ok`: a file that does not exist has no rows. `growing`: a process may be appending to the file, or was killed while
    it did, so a last line without its newline is left out. Raises Refused with path and line number for what is no JSON object.
    """
    return [] if missing_ok and not path.exists() else list(stream_json_lines(path, growing=growing))


def stream_json_lines(path: Path, *, growing: bool = False) -> Iterator[Row]:
    """Yield the rows of a file as read_json_lines reads them, one in memory at a time."""
    with path.open(encoding="utf-8") as file:  # whose lines end at line feeds alone: U+2028 may stand inside a JSON string
        for number, line in enumerate(file, 1):
            if line.strip() and (line.endswith("\n") or not growing):
                yield _parse_object(line.removesuffix("\n"), path, f"line {number}: ")


def load_json_object(path: Path, *, missing_ok: bool = False) -> Row:
    """Read the object of a JSON file. Raises Refused with its path if the file holds none; `read_json_object` forgives that."""
    return {} if missing_ok and not path.exists() else _parse_object(path.read_text(encoding="utf-8"), path)


def write_json(path: Path, values: Any, *, shared: bool = False, **options: Any) -> None:
    """Write a JSON file, whole or not at all, and make its folder; `shared` as in write_atomically, `options` as in json.dumps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values, **options) + "\n", shared=shared)


def dump_json_lines(rows: Iterable[Mapping[str, Any]], **options: Any) -> str:
    """Return the text of such a file; `options` are those of json.dumps."""
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def _parse_object(text: str, path: Path, where: str = "") -> Row:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise Refused(f"{path} is damaged: {where}{error}") from None
    if not isinstance(values, dict):
        raise Refused(f"{path} is damaged: {where}{text.strip()[:50]} has no names")
    return values


def read_json_object(path: Path) -> Row:
    """Read a file of one JSON object for display or bookkeeping; empty if it is absent, half-written, or holds something else."""
    try:
        return load_json_object(path)
    except (OSError, ValueError):
        return {}
