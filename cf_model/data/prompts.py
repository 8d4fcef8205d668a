"""A file of prompts."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, in the file's order. Blank lines are skipped, inner white space is made one space."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; name a file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as a text file with one prompt a line") from None
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt in it; write one prompt a line")
    return prompts
