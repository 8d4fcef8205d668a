"""New clips: from the folder in which they arrive into the one that `dvc add` tracks. What is in a video is the filter's to judge."""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".filepart")
CAPTION = ".txt"  # beside a video of that name
VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")  # as tasks/clips.py takes them
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # ours to mend, and no clip's fault


@dataclass
class Arrivals:
    taken: list[str] = field(default_factory=list)
    turned_away: dict[str, str] = field(default_factory=dict)  # file -> why; next night it is asked again
    known: int = 0


def take(inbox: Path, folder: Path, *, settle: float) -> Arrivals:
    """Copies what is new by its content; `inbox` stays as it is. Nothing in it can fail a night: what can't be taken is turned away.

    A known name with other content gets a name of its own. A caption that changed replaces the one before; of a clip that is there
    twice, the first one's caption is taken.
    """
    found = Arrivals()
    if not inbox.is_dir():
        raise ValueError(f"nightly.inbox is {inbox}, which is no folder; make it, or set it to null")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.rglob("*.partial"):  # by a night that was killed
        left.unlink()
    here = {digest(file): file for file in sorted(folder.rglob("*")) if file.is_file()}
    names: dict[Path, Path] = {}  # stem in the inbox -> stem here, of a video that had to be renamed
    captions: dict[Path, str] = {}  # here -> in the inbox
    files = sorted(inbox.rglob("*"), key=lambda file: (file.suffix == CAPTION, file))
    for file in files:
        name = file.relative_to(inbox)
        if any(part.startswith(".") for part in name.parts) or (file.is_dir() and not file.is_symlink()):
            continue
        try:
            if reason := refused(file, name, settle):
                found.turned_away[told(name)] = reason
                continue
            content = digest(file)
            if file.suffix != CAPTION and content in here:
                found.known += 1
                names[name.with_suffix("")] = here[content].relative_to(folder).with_suffix("")
                continue
            place = _place(file, name, folder, content, names)
            if file.suffix == CAPTION and (first := captions.setdefault(place, name.as_posix())) != name.as_posix():
                found.turned_away[told(name)] = f"is the caption of a copy, whose caption is {first}"
            elif file.suffix == CAPTION and place.is_file() and digest(place) == content:
                found.known += 1
            else:
                _copy(file, place)
                here[content] = place
                found.taken.append(place.relative_to(folder).as_posix())
        except OSError as error:
            if error.errno in FULL:
                raise RuntimeError(f"{told(name)} could not be copied to {folder}: {error.strerror}") from None
            found.turned_away[told(name)] = f"can't be read: {error.strerror or type(error).__name__}"
    return found


def told(name: Path) -> str:
    """Also of a name that is no UTF-8, which neither a log nor JSON can hold."""
    return name.as_posix().encode(errors="backslashreplace").decode()


def refused(file: Path, name: Path, settle: float) -> str | None:
    if file.is_symlink() or not file.is_file():
        return "is no file of its own"
    if file.suffix.lower() in UNFINISHED:
        return "is not finished, by its name"
    if any(not character.isprintable() for character in name.as_posix()):
        return "has a name with characters that can't be shown"
    if file.suffix.lower() not in VIDEOS and file.suffix != CAPTION:
        return f"is neither a video ({', '.join(VIDEOS)}) nor a caption ({CAPTION})"
    stat = file.stat()
    # a time that is still to come was copied with the file, or its writer's clock is ahead: then what our own file system saw counts
    if abs(time.time() - min(stat.st_mtime, stat.st_ctime)) < settle:
        return f"was written to in the last {settle:g} s; the next night takes it"
    if not stat.st_size:
        return "is empty"
    if file.suffix == CAPTION and not file.read_text(encoding="utf-8-sig", errors="replace").split():
        return "is an empty caption; its video is called by its name"
    return None


def _place(file: Path, name: Path, folder: Path, content: str, names: dict[Path, Path]) -> Path:
    stem = name.with_suffix("")
    if file.suffix == CAPTION:
        return (folder / names.get(stem, stem)).with_name(names.get(stem, stem).name + CAPTION)
    place = folder / name
    if place.exists():
        place = place.with_name(f"{place.stem}-{content[:8]}{place.suffix}")
        names[stem] = place.relative_to(folder).with_suffix("")
    return place


def _copy(file: Path, place: Path) -> None:
    """Whole or not at all. DVC write-protects nothing of it yet, and the inbox's own file is never linked."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + ".partial")
    try:
        shutil.copyfile(file, partial)
        partial.replace(place)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
