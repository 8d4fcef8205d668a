"""Writing of files and folders that are either complete or absent: beside the path, whose name the new one then takes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write `content` (text as UTF-8) to `path`, so that a reader finds the old file or the new one and never half of either."""
    with open_partial(path, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_partial(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield the path of a partial file to write, which takes the place of `path` at the end of the block and is removed on an error.

    `shared`: several processes may write `path` at the same time, so each has a partial file of its own. Otherwise the partial
    file's name is always the same, because the next attempt of a killed process must replace what the first one left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def swap_into_place(new: Path, path: Path) -> None:
    """Let a complete file or folder take the place of another, or of none; what was there is deleted only afterwards."""
    old = path.with_name(path.name + ".old")
    delete_path(old)
    if path.exists():
        path.rename(old)
    shutil.move(new, path)  # a renaming, but for a folder on another disk
    delete_path(old)


def delete_path(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
