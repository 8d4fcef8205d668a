"""Files of prompts: UTF-8 text, one prompt a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

LONGEST_LINE = 20_000  # bytes of a line; a file without line ends is not read into memory


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """Read the first `count` prompts of a file, or all of them."""
    return [prompt for _, prompt in islice(iterate_prompts(path), count)]


def iterate_prompts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each prompt with its line's number, from 1 on, without reading the file ahead.

    Blank lines are skipped, white space within a prompt becomes one space. A line that is no text raises a ValueError
    that names its number.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; name a file with one prompt a line")
    number, has_prompt = 0, False
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            prompt = " ".join(decode_line(line, number, path).split())
            if prompt:
                has_prompt = True
                yield number, prompt
    if not has_prompt:
        raise ValueError(f"{path} has no prompt in it; write one prompt a line")


def decode_line(line: bytes, number: int, path: Path) -> str:
    """Decode a line; raises ValueError if it is too long, not UTF-8, or holds a zero byte."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{path} line {number} has more than {LONGEST_LINE:,} bytes; write one prompt a line")
    try:
        words = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    if "\0" in words:
        raise ValueError(f"{path} line {number} holds a zero byte, so it is no text; save the file as UTF-8")
    return words
