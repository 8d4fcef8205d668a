"""Sekai and UltraVideo, the collections that the paper trains on (sec. 4), as the Hugging Face Hub has them: tables and zip files.

Sekai (github.com/Lixsp11/sekai-codebase, README): the game's videos are on the Hub, the walking ones as an archive in two parts. The
columns are videoFile, cameraFile, caption, location, scene, crowdDensity, weather, timeOfDay. Sekai-Real is on YouTube: its own tools
fetch and cut it, and then its table is one for `clips.source: table`.
UltraVideo-Long (huggingface.co/datasets/APRIL-AIGC/UltraVideo-Long, long.csv): clips of more than 10 s, here 960 pixels wide. The columns
are those of UltraVideo's short.csv: clip_id names the file; url, start_time and end_time the film that it was cut from; captions are in
Brief Description, Detailed Description and others.
Both are licensed for research that is not commercial. This file names them and holds nothing of theirs.
"""

from __future__ import annotations

import fnmatch
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import HfApi

from .clip_table import ClipEntry, read_clip_table
from .fetch_files import FetchLimits, check_sum


@dataclass(frozen=True)
class HubCollection:
    """Where a collection's files are."""

    repository: str
    tables: tuple[str, ...]
    archives: tuple[str, ...]  # patterns of zip files; one in parts ends in .part_aa, .part_ab and so on


COLLECTIONS = {
    "sekai": HubCollection(
        "Lixsp11/Sekai-Project",
        ("train/sekai-game-walking.csv", "train/sekai-game-drone.csv"),
        ("*sekai-game-walking.zip*", "*sekai-game-drone.zip*"),
    ),
    "ultravideo": HubCollection("APRIL-AIGC/UltraVideo-Long", ("long.csv",), ("*clips_long_960*.zip*",)),
}


@dataclass(frozen=True)
class CollectionVideo:
    """A video of a collection: its row of the table, where it came from, and its open file."""

    entry: ClipEntry
    origin: str  # repository@commit:archive/member
    file: zipfile.ZipExtFile


class CollectionReader:
    """Reader of a collection's videos, archive by archive, which fetches each archive when its turn comes.

    Files are fetched to `folder`, by huggingface_hub, which goes on where an earlier fetch broke off. Each is compared with the Hub's
    sha256. All errors are ValueErrors of one sentence.
    """

    def __init__(self, name: str, folder: Path, limits: FetchLimits) -> None:
        self.collection, self.folder, self.limits = COLLECTIONS[name], folder, limits
        repository = self.collection.repository
        try:
            info = HfApi().dataset_info(repository, revision=limits.revision, files_metadata=True)
        except (OSError, ValueError, httpx2.HTTPError) as error:
            raise ValueError(f"{repository} can't be asked for its files ({_shorten(error)}); try again where there is a network") from None
        self.commit = str(info.sha)
        self.files: dict[str, Any] = {file.rfilename: file for file in info.siblings or []}
        self.archives = list(self._list_archives())
        tables = [read_clip_table(self._fetch(table)) for table in self.collection.tables]
        # Archives have folders of their own inside, so a table's file is known by its name alone, with its ending or without it.
        self.missing = {PurePosixPath(entry.file).stem: entry for table in tables for entry in table}

    def _list_archives(self) -> Iterator[list[str]]:
        """Yield the parts of each archive, in their order; refuse all before the first is fetched if one is too large."""
        for pattern in self.collection.archives:
            names = sorted(fnmatch.filter(self.files, pattern), key=_split_numbers)
            if not names:
                where = f"{self.collection.repository}@{self.commit[:12]}"
                raise ValueError(f"{where} has no file {pattern}: it was changed; state an earlier clips.fetch.revision")
            for name in names:
                self.limits.refuse_size(self.files[name].size or 0, f"{name} of {self.collection.repository}")
            yield from (list(parts) for _, parts in groupby(names, key=lambda name: name.partition(".part_")[0]))

    def _fetch(self, name: str) -> Path:
        repository = self.collection.repository
        try:
            path = HfApi().hf_hub_download(repository, name, repo_type="dataset", revision=self.commit, local_dir=self.folder)
        except (OSError, ValueError, httpx2.HTTPError) as error:
            raise ValueError(f"{name} of {repository} was not fetched ({_shorten(error)}); start again to go on with it") from None
        stated = self.files[name].lfs if name in self.files else None
        check_sum(Path(path), stated.sha256 if stated else None, f"{name} of {repository}")
        return Path(path)

    def __iter__(self) -> Iterator[CollectionVideo]:
        """Yield the videos that the tables list, in the archives' order. At the end `missing` has the rows that no archive held."""
        for parts in self.archives:
            with JoinedFiles([self._fetch(part) for part in parts]) as joined:
                try:
                    archive = zipfile.ZipFile(joined)
                except zipfile.BadZipFile as error:
                    name = f"{parts[0]} of {self.collection.repository}"
                    raise ValueError(f"{name} is no zip file ({error}); remove it from {self.folder}") from None
                for member in archive.infolist():
                    path = PurePosixPath(member.filename)
                    if path.suffix.lower() == ".mp4" and (entry := self.missing.pop(path.stem, None)):
                        self.limits.refuse_size(member.file_size, f"{member.filename} in {parts[0]}")
                        with archive.open(member) as file:
                            assert isinstance(file, zipfile.ZipExtFile)  # which is more than typeshed says
                            origin = f"{self.collection.repository}@{self.commit}:{parts[0].partition('.part_')[0]}/{member.filename}"
                            yield CollectionVideo(entry, origin, file)


class JoinedFiles(io.RawIOBase):
    """Files read as one, because an archive in parts would otherwise be on the disk twice."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [path.open("rb") for path in paths]
        self.sizes = [path.stat().st_size for path in paths]
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: sum(self.sizes)}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer from the file that the place is in, up to that file's end; 0 means the end of the last one."""
        before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            if self.place < before + size:
                file.seek(self.place - before)
                count = file.readinto(memoryview(buffer)[: before + size - self.place])
                self.place += count
                return count
            before += size
        return 0

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


def _split_numbers(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts clips_2.zip before clips_10.zip."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
