"""Files of prompts: UTF-8 text, one prompt a line, or a CSV or Parquet file with a column `prompt`, and which of them are trained on.

VidProM's table (huggingface.co/datasets/WenhaoWang/VidProM, VidProM_unique.csv) has the columns uuid, prompt and time, and six
probabilities of unfit content; a list of uuids chooses its prompts.
"""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST_LINE = 20_000  # bytes of a line; a file without line ends is not read into memory
COLUMN = "prompt"  # of a CSV or Parquet file, as VidProM names it
IDS = ("uuid", "id")  # columns that name a prompt; the first one that a table has is used


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """Read the first `count` prompts of a file, or all of them."""
    return [prompt for _, prompt in islice(iterate_prompts(path), count)]


def iterate_prompts(path: Path, ids: Collection[str] = ()) -> Iterator[tuple[int, str]]:
    """Yield each prompt with its line's number, from 1 on, without reading the file ahead.

    Blank prompts are skipped, white space within a prompt becomes one space. With `ids`, only the prompts of a table that they name are
    taken. A line that is no text raises a ValueError that names its number; so do a CSV or Parquet file without a column `prompt`, and
    at the end an id that was not there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; name a file with one prompt a line, or a CSV or Parquet file with a column `{COLUMN}`")
    if ids and path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} has no ids, but prompts.ids names some; use a CSV or Parquet file with a column {' or '.join(IDS)}")
    has_prompt, missing = False, set(ids)
    if path.suffix in (".csv", ".parquet"):
        lines = _read_chosen(_read_csv(path) if path.suffix == ".csv" else _read_parquet(path), ids, missing)
    else:
        lines = _read_lines(path)
    for number, text in lines:
        if prompt := " ".join(text.split()):
            has_prompt = True
            yield number, prompt
    if not has_prompt:
        raise ValueError(f"{path} has no prompt in it; write one prompt a line, or a CSV or Parquet file with a column `{COLUMN}`")
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(set(ids))} ids, such as {min(missing)}; take them out of prompts.ids")


def read_ids(path: Path) -> set[str]:
    """Read a file of ids, one a line; raises ValueError if it has none or is no text."""
    ids = {line.strip() for _, line in _read_lines(path) if line.strip()} if path.is_file() else set()
    if not ids:
        raise ValueError(f"{path} holds no ids; write one a line")
    return ids


def _read_chosen(cells: Iterator[tuple[int, str, str]], ids: Collection[str], missing: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the rows of a table that `ids` names, or all if it names none, and take their ids out of `missing`."""
    for number, text, name in cells:
        if not ids or name in ids:
            missing.discard(name)
            yield number, text


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, decoded one by one."""
    number = 0
    # bytes as characters, so that a line may end as on any system and a bad byte is told by its line
    with path.open(encoding="latin-1", newline=None) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            yield number, decode_line(line.encode("latin-1"), number, path)


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the prompts and ids of a CSV file, each with the number of the line on which its row ends."""
    rows = csv.DictReader((line for _, line in _read_lines(path)), strict=True)
    try:
        _require_column(path, rows.fieldnames or [COLUMN])
        for row in rows:
            yield rows.line_num, row[COLUMN] or "", _pick_id(row)
    except csv.Error as error:
        problem = f"{path} line {rows.reader.line_num} is no CSV ({error})"
        raise ValueError(f"{problem}; quote each cell that has a comma or a line end") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the prompts and ids of a Parquet file with their rows' numbers, a batch of rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet  # here, because it takes longer to import than a file of text takes to read

    try:
        with parquet.ParquetFile(path) as file:
            _require_column(path, file.schema_arrow.names)
            kind = file.schema_arrow.field(COLUMN).type
            if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_dictionary)):
                raise ValueError(f"{path}'s column `{COLUMN}` holds {kind}, no text; rename the column that holds the prompts")
            columns = [COLUMN, *(name for name in IDS if name in file.schema_arrow.names)]
            rows = (row for batch in file.iter_batches(batch_size=1024, columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield number, check_text(row[COLUMN] or "", number, path), _pick_id(row)
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"{path} is no Parquet file that can be read ({reason}); write it again, or as a CSV file") from None


def _pick_id(row: Mapping[str, Any]) -> str:
    """Return what names a row of a table; empty if nothing does."""
    return next((str(row[name]).strip() for name in IDS if row.get(name)), "")


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


@dataclass(frozen=True)
class PromptSpec:
    """The prompts that students are trained on; start.prompts says where they come from. All but `most` is for a file of prompts, because
    the clips' captions have passed the filter."""

    most: int | None  # prompts that are embedded, the first of them; None: all
    ids: Path | None  # a file of ids, one a line: those of the table's prompts alone, by its column uuid or id; None: all
    min_words: int  # a shorter prompt is left out
    max_words: int  # a longer one too
    heldout: float  # share of the prompts that no training stage reads, written to data/prompts/heldout.txt

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ValueError(f"most is {self.most}; use 1 or more, or null for all")
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"min_words is {self.min_words} and max_words {self.max_words}; use 0 or more, and at least as much")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}; it is a share: use 0 or more, and less than 1")

    def fits(self, prompt: str) -> bool:
        """Return whether a prompt has a length that is trained on."""
        return self.min_words <= len(prompt.split()) <= self.max_words

    def holds_out(self, prompt: str) -> bool:
        """Return whether a prompt is held out. Its letters alone decide, so new prompts in the file move none of the others.

        # Choice: by a hash, because a set that is drawn anew for a longer file would hold out what was trained on before.
        """
        return int.from_bytes(_hash_prompt(prompt)[:8], "big") < self.heldout * 2**64


class PromptSplit:
    """The training prompts of a file, to be iterated once: distinct, of a length that fits, none of `shown`, and none that is held out.

    `heldout` has the held-out ones of the whole file after the last prompt. Near-identical prompts are never on both sides. What stands
    after the first `most` is read for the held-out ones alone.
    """

    def __init__(self, path: Path, spec: PromptSpec, shown: Iterable[str]) -> None:
        self.path, self.spec, self.shown = path, spec, shown
        self.ids = read_ids(spec.ids) if spec.ids else set[str]()
        # To its end, because a bad line must be refused before hours of embedding.
        self.total = sum(1 for _ in iterate_prompts(path, self.ids))
        self.heldout: list[str] = []

    def __iter__(self) -> Iterator[str]:
        count = 0
        fitting = (prompt for _, prompt in iterate_prompts(self.path, self.ids) if self.spec.fits(prompt))
        for prompt in select_distinct(fitting, without=self.shown):
            if self.spec.holds_out(prompt):
                self.heldout.append(prompt)
            elif self.spec.most is None or count < self.spec.most:
                count += 1
                yield prompt

    def write_heldout(self, file: Path) -> None:
        """Write the held-out prompts, one a line, if there are any."""
        if self.heldout:
            file.write_text("".join(f"{prompt}\n" for prompt in self.heldout), encoding="utf-8")


def select_distinct(prompts: Iterable[str], without: Iterable[str] = ()) -> Iterator[str]:
    """Yield each prompt once, in the order in which it first comes, and none of `without`; see `normalise_prompt` for what makes another.

    Only a hash of each prompt is held in memory: 250,000 prompts take some 25 MB.
    """
    known = {_hash_prompt(prompt) for prompt in without}
    for prompt in prompts:
        if (key := _hash_prompt(prompt)) not in known:
            known.add(key)
            yield prompt


def normalise_prompt(prompt: str) -> str:
    """Return the letters and digits of a prompt, without case, spaces, punctuation and symbols: near-identical prompts share them.

    Vowel signs and accents (Unicode's marks) stay, because without them other words would be the same. A prompt of symbols alone is
    itself.
    """
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] in "LMN") or folded


def _hash_prompt(prompt: str) -> bytes:
    """Return 16 bytes that near-identical prompts share."""
    return hashlib.blake2b(normalise_prompt(prompt).encode(), digest_size=16).digest()
