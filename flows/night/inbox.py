"""New clips: copied from the folder in which they arrive into the folder that `dvc add` tracks. The filter judges their content."""

import errno
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from tasks.files.atomic import open_partial
from tasks.files.hashes import compute_dvc_md5
from tasks.files.texts import read_text_file
from tasks.files.videos import VIDEO_SUFFIXES

UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".filepart")
CAPTION = ".txt"  # beside a video of that name
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # the machine's fault, and not the clip's


@dataclass
class Arrivals:
    """What one look into the inbox found. A file that is turned away is looked at again the next night."""

    copied: list[str] = field(default_factory=list)
    turned_away: dict[str, str] = field(default_factory=dict)  # file -> why
    duplicates: int = 0


def copy_new_clips(inbox: Path, folder: Path, *, settle: float) -> Arrivals:
    """Copy into `folder` what is new by its content; the inbox stays as it is, and no file in it can fail a night.

    Another clip under a known name gets a name of its own. A caption that changed replaces the one before; of a clip that is in the
    inbox twice, the first one's caption is taken. Files written to in the last `settle` seconds are turned away.
    Raises ValueError if the inbox is no folder, RuntimeError if the disk of `folder` is full or read-only.
    """
    arrivals = Arrivals()
    if not inbox.is_dir():
        raise ValueError(f"nightly.inbox is {inbox}, which is no folder; make it, or set it to null")
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.rglob("*.partial"):  # of a night that was killed
        partial.unlink()
    by_content = {compute_dvc_md5(file): file for file in sorted(folder.rglob("*")) if file.is_file()}
    renamed: dict[Path, Path] = {}  # stem in the inbox -> stem in the folder, where a video has another name there
    captions: dict[Path, str] = {}  # caption in the folder -> its name in the inbox
    for file in sorted(inbox.rglob("*"), key=lambda file: (file.suffix == CAPTION, file)):
        name = file.relative_to(inbox)
        if any(part.startswith(".") for part in name.parts) or (file.is_dir() and not file.is_symlink()):
            continue
        try:
            if reason := reason_to_refuse(file, name, settle):
                arrivals.turned_away[printable_name(name)] = reason
                continue
            content = compute_dvc_md5(file)
            if file.suffix != CAPTION and content in by_content:
                arrivals.duplicates += 1
                renamed[name.with_suffix("")] = by_content[content].relative_to(folder).with_suffix("")
                continue
            place = _choose_place(file, name, folder, content, renamed)
            if file.suffix == CAPTION and (first := captions.setdefault(place, name.as_posix())) != name.as_posix():
                arrivals.turned_away[printable_name(name)] = f"is the caption of a copy, whose caption is {first}"
            elif file.suffix == CAPTION and place.is_file() and compute_dvc_md5(place) == content:
                arrivals.duplicates += 1
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                with open_partial(place) as partial:  # a copy and no link, because DVC write-protects what it adds
                    shutil.copyfile(file, partial)
                by_content[content] = place
                arrivals.copied.append(place.relative_to(folder).as_posix())
        except OSError as error:
            if error.errno in DISK_FAULTS:
                raise RuntimeError(f"{printable_name(name)} could not be copied to {folder}: {error.strerror}") from None
            arrivals.turned_away[printable_name(name)] = f"can't be read: {error.strerror or type(error).__name__}"
    return arrivals


def printable_name(name: Path) -> str:
    """Return the name as text that a log and JSON can hold, also where it is not UTF-8."""
    return name.as_posix().encode(errors="backslashreplace").decode()


def reason_to_refuse(file: Path, name: Path, settle: float) -> str | None:
    """Return why a file of the inbox is turned away, or None. `name` is its path below the inbox."""
    if file.is_symlink() or not file.is_file():
        return "is no file of its own"
    if file.suffix.lower() in UNFINISHED:
        return "is not finished, by its name"
    if any(not character.isprintable() for character in name.as_posix()):
        return "has a name with characters that can't be shown"
    if file.suffix.lower() not in VIDEO_SUFFIXES and file.suffix != CAPTION:
        return f"is neither a video ({', '.join(VIDEO_SUFFIXES)}) nor a caption ({CAPTION})"
    stat = file.stat()
    # a time in the future was copied with the file, or the writer's clock is ahead: then the time that this file system saw counts
    if abs(time.time() - min(stat.st_mtime, stat.st_ctime)) < settle:
        return f"was written to in the last {settle:g} s; the next night takes it"
    if not stat.st_size:
        return "is empty"
    if file.suffix == CAPTION:
        try:
            if not read_text_file(file)[0].split():
                return "is an empty caption; its video is called by its name"
        except ValueError as error:
            return str(error).removeprefix(f"{file.name} ")
    return None


def _choose_place(file: Path, name: Path, folder: Path, content: str, renamed: dict[Path, Path]) -> Path:
    """Return where a file goes: a caption beside its video, a video under its name or, if that is another clip's, a name of its own."""
    stem = name.with_suffix("")
    if file.suffix == CAPTION:
        return (folder / renamed.get(stem, stem)).with_name(renamed.get(stem, stem).name + CAPTION)
    place = folder / name
    if place.exists():
        place = place.with_name(f"{place.stem}-{content[:8]}{place.suffix}")
        renamed[stem] = place.relative_to(folder).with_suffix("")
    return place
