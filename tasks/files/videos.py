"""Which files count as videos: for the stage `clips`, for the nightly inbox, and for the forecast of `cf plan`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".mts", ".m2ts", ".3gp", ".ogv")


@dataclass
class VideoFolder:
    """The videos anywhere below a folder, and what looks like one and is none."""

    videos: list[Path] = field(default_factory=list)  # sorted by path
    left_out: dict[Path, str] = field(default_factory=dict)  # file or folder -> why


def list_videos(folder: Path) -> list[Path]:
    """List the video files anywhere below `folder`, sorted by path; the case of a suffix does not matter."""
    return look_for_videos(folder).videos


def look_for_videos(folder: Path) -> VideoFolder:
    """Look for videos below `folder`, through linked folders too. Hidden files are no videos; a file with several names counts once."""
    found, known = VideoFolder(), dict[tuple[int, int], Path]()
    for file in sorted(_walk_folder(folder, found, (folder.resolve(),))):
        if file.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        try:
            stat = file.stat()
        except OSError as error:
            what = "is a link to nothing" if file.is_symlink() else f"can't be read ({error.strerror})"
            found.left_out[file] = what
            continue
        first = known.setdefault((stat.st_dev, stat.st_ino), file)
        if not file.is_file():
            continue
        if file.name.startswith("."):
            found.left_out[file] = "is hidden"
        elif first != file:
            found.left_out[file] = f"is {first.relative_to(folder).as_posix()} under another name"
        else:
            found.videos.append(file)
    return found


def _walk_folder(folder: Path, found: VideoFolder, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield all files below a folder; a link to a folder above it is left out, because it has no end."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.left_out[folder] = f"can't be read ({error.strerror})"
        return
    for entry in entries:
        path = folder / entry.name
        if not entry.is_dir():
            yield path
        elif entry.name.startswith("."):
            continue
        elif (real := path.resolve()) in above:
            found.left_out[path] = "is a link to a folder that it is in"
        else:
            yield from _walk_folder(path, found, (*above, real))
