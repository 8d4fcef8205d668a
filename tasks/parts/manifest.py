"""The manifest that the stage filter writes: every clip, and whether and where it is used."""

from pathlib import Path

from tasks.files.json_lines import Row, read_json_lines


def read_split(path: Path, split: str) -> list[Row]:
    """Read the accepted clips of a split, in the manifest's order."""
    return [row for row in read_json_lines(path) if row["kept"] and row["split"] == split]
