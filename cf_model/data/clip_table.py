"""Tables of clips: CSV, Parquet or JSON lines, a row a clip, by the column names that published collections use."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The first of these names that a table has is used. Sekai has videoFile and caption, UltraVideo clip_id and Detailed Description.
FILE = ("file", "path", "videoFile", "clip_id", "video", "url")
CAPTION = ("caption", "Detailed Description", "text", "prompt")
START = ("start", "start_time", "begin")
END = ("end", "end_time")
CHECKSUM = ("sha256", "md5")
# A file that this column names was cut out already: UltraVideo's start_time and end_time are of the film that it was cut from.
CUT_OUT = "clip_id"
LARGEST_CELL = 1_000_000  # characters


@dataclass(frozen=True)
class ClipEntry:
    """A row of a table."""

    file: str  # in the folder, or an address
    caption: str | None
    start: float | None  # seconds
    end: float | None
    row: int  # from 1 on
    checksum: str | None = None  # of the file at an address, sha256 or md5

    @property
    def is_address(self) -> bool:
        """Whether the file is to be fetched."""
        return "://" in self.file

    @property
    def facts(self) -> dict[str, Any]:
        """What the row changes in a clip's row of clips.jsonl: the caption, and the seconds that are taken of the file."""
        caption = {"caption": self.caption} if self.caption else {}
        return caption | ({} if self.start is None and self.end is None else {"from": self.start, "to": self.end})

    @property
    def suffix(self) -> str:
        """What the row adds to a clip's id: the seconds that are taken, because several rows may name one file."""
        if self.start is None and self.end is None:
            return ""
        return f"-{self.start or 0:g}-{'end' if self.end is None else f'{self.end:g}'}"


def read_clip_table(path: Path) -> list[ClipEntry]:
    """Read a table; ValueError names the file, the row and the rule for the first one that can't be used."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    if not path.is_file() or path.suffix not in readers:
        kinds = " or ".join(readers)
        raise ValueError(f"{path} is no table of clips; name a file that ends in {kinds}, with columns {FILE[0]} and {CAPTION[0]}")
    try:
        entries = [_make_entry(row, number, path) for number, row in enumerate(readers[path.suffix](path), 1)]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    if not entries:
        raise ValueError(f"{path} has no rows; give it one for each clip")
    return entries


def match_entries(entries: Sequence[ClipEntry], files: Collection[str], *, whole: bool) -> list[tuple[str, ClipEntry | None]]:
    """Return names of files with their rows of a table, in its order; a row of none of the files keeps its own name.

    `whole`: return all files, in their own order, with their rows as far as there are some.
    """
    names = {name.rpartition("/")[2].rpartition(".")[0]: name for name in files}  # collections name a clip without its ending
    matched = [(entry.file if entry.file in files else names.get(entry.file, entry.file), entry) for entry in entries]
    rows = dict(matched)
    return [(name, rows.get(name)) for name in files] if whole else list(matched)


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.DictReader(file, strict=True)
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV ({error}); quote each cell that has a comma or a line end") from None


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is no JSON ({error}); write an object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is no JSON object; write an object a line")
            yield row


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet  # here, because it takes longer to import than a CSV file takes to read

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"{path} is no Parquet file that can be read ({reason}); write it anew") from None


def _make_entry(row: Mapping[str, Any], number: int, path: Path) -> ClipEntry:
    file, caption = _pick_column(row, FILE), _pick_column(row, CAPTION)
    where = f"{path} row {number}"
    if not isinstance(file, str) or not file.strip():
        raise ValueError(f"{where} names no file; give the table a column {' or '.join(FILE)}, with a path in every row")
    if "://" not in file and (Path(file).is_absolute() or ".." in Path(file).parts):
        raise ValueError(f"{where} names {file}, which is not below clips.folder; name a file in it")
    checksum = _pick_column(row, CHECKSUM)
    if checksum and not re.fullmatch(r"[0-9a-fA-F]{32}(?:[0-9a-fA-F]{32})?", str(checksum)):
        raise ValueError(f"{where} has the checksum {checksum!r}; write a sha256 or md5 in hexadecimal digits, or leave it out")
    columns = (START[:1], END[:1]) if file == row.get(CUT_OUT) else (START, END)
    times = [_read_seconds(_pick_column(row, names), names[0], where) for names in columns]
    if times[1] is not None and times[1] <= (times[0] or 0):
        raise ValueError(f"{where} ends at {times[1]:g} s and begins at {times[0] or 0:g} s; let it end later")
    words = " ".join(str(caption).split()) if caption else None
    return ClipEntry(file.strip(), words, times[0], times[1], number, str(checksum) if checksum else None)


def _pick_column(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _read_seconds(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{where}: {name} is {value!r}; it must be a number of seconds, or left out")
    return seconds
