"""Which files count as videos: for the stage `clips`, for the nightly inbox, and for the forecast of `cf plan`."""

from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")


def list_videos(folder: Path) -> list[Path]:
    """List the video files anywhere below `folder`, sorted by path; the case of a suffix does not matter."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
