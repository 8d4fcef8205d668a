"""Files of prompts: UTF-8 text, one prompt a line, or a CSV or Parquet file with a column `prompt`."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

LONGEST_LINE = 20_000  # bytes of a line; a file without line ends is not read into memory
COLUMN = "prompt"  # of a CSV or Parquet file, as VidProM names it


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """Read the first `count` prompts of a file, or all of them."""
    return [prompt for _, prompt in islice(iterate_prompts(path), count)]


def iterate_prompts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each prompt with its line's number, from 1 on, without reading the file ahead.

    Blank prompts are skipped, white space within a prompt becomes one space. A line that is no text raises a ValueError
    that names its number; so does a CSV or Parquet file without a column `prompt`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; name a file with one prompt a line, or a CSV or Parquet file with a column `{COLUMN}`")
    has_prompt, readers = False, {".csv": _read_csv, ".parquet": _read_parquet}
    for number, text in readers.get(path.suffix, _read_lines)(path):
        if prompt := " ".join(text.split()):
            has_prompt = True
            yield number, prompt
    if not has_prompt:
        raise ValueError(f"{path} has no prompt in it; write one prompt a line, or a CSV or Parquet file with a column `{COLUMN}`")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, decoded one by one."""
    number = 0
    # bytes as characters, so that a line may end as on any system and a bad byte is told by its line
    with path.open(encoding="latin-1", newline=None) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            yield number, decode_line(line.encode("latin-1"), number, path)


def _read_csv(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the cells of a CSV file's column `prompt`, each with the number of the line on which its row ends."""
    rows = csv.DictReader((line for _, line in _read_lines(path)), strict=True)
    try:
        _require_column(path, rows.fieldnames or [COLUMN])
        for row in rows:
            yield rows.line_num, row[COLUMN] or ""
    except csv.Error as error:
        problem = f"{path} line {rows.reader.line_num} is no CSV ({error})"
        raise ValueError(f"{problem}; quote each cell that has a comma or a line end") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the cells of a Parquet file's column `prompt` with their rows' numbers, a batch of rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet  # here, because it takes longer to import than a file of text takes to read

    try:
        with parquet.ParquetFile(path) as file:
            _require_column(path, file.schema_arrow.names)
            kind = file.schema_arrow.field(COLUMN).type
            if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_dictionary)):
                raise ValueError(f"{path}'s column `{COLUMN}` holds {kind}, no text; rename the column that holds the prompts")
            cells = (cell for batch in file.iter_batches(batch_size=1024, columns=[COLUMN]) for cell in batch.column(0))
            for number, cell in enumerate(cells, 1):
                text = cell.as_py()
                yield number, check_text(text or "", number, path)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"{path} is no Parquet file that can be read ({reason}); write it again, or as a CSV file") from None


def _require_column(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError if a table has no column of prompts."""
    if COLUMN not in names:
        raise ValueError(f"{path} has no column `{COLUMN}`, only {', '.join(names)}; rename the column that holds the prompts")


def decode_line(line: bytes, number: int, path: Path) -> str:
    """Decode a line; raises ValueError if it is too long, not UTF-8, or holds a zero byte."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{path} line {number} has more than {LONGEST_LINE:,} bytes; write one prompt a line")
    try:
        words = line.decode("utf-8-sig")  # a mark may begin any line: files are joined
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    return check_text(words, number, path)


def check_text(words: str, number: int, path: Path) -> str:
    """Return a line's or cell's text; raises ValueError if it is too long or holds a zero byte."""
    if len(words) > LONGEST_LINE:
        raise ValueError(f"{path} line {number} has more than {LONGEST_LINE:,} characters; write one prompt a line")
    if "\0" in words:
        raise ValueError(f"{path} line {number} holds a zero byte, so it is no text; save the file as UTF-8")
    return words


def select_distinct(prompts: Iterable[str], without: Iterable[str] = ()) -> Iterator[str]:
    """Yield each prompt once, in the order in which it first comes, and none of `without`; case makes no other prompt.

    Only a hash of each prompt is held in memory: 250,000 prompts take some 25 MB.
    """
    known = {_hash_prompt(prompt) for prompt in without}
    for prompt in prompts:
        if (key := _hash_prompt(prompt)) not in known:
            known.add(key)
            yield prompt


def _hash_prompt(prompt: str) -> bytes:
    """Return 16 bytes that prompts share where they differ in case and white space alone."""
    return hashlib.blake2b(" ".join(prompt.casefold().split()).encode(), digest_size=16).digest()
