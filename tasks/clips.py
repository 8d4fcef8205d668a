"""Stage `clips`: make the clips that all later stages start from: rendered from worlds, copied from the user's folder, or fetched.

Among rendered clips there are bad ones on purpose ("planted"), so that tests and the report can say whether the stage filter finds them.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from cf_model.data.clip_table import ClipEntry, match_entries, read_clip_table
from cf_model.data.fetch_files import AddressFetcher
from cf_model.data.hub_collections import CollectionReader
from cf_model.data.planted import PLANTED, render_clips
from cf_model.data.scratch import ScratchMap
from cf_model.data.video_folder import VideoFolder
from tasks.files.atomic import open_partial
from tasks.files.json_lines import Row
from tasks.files.texts import read_text_file
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.params.schema import Params
from tasks.runner.track import Track

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # not the clip's
FETCHED = Path("work/fetched")  # what was fetched stays here, so that another run fetches nothing again


def run(params: Params, track: Track, *, out: Path) -> dict[str, float]:
    """Write the video files and clips.jsonl to `out`; return the numbers of all clips and of planted ones.

    A row has id, file, caption, source (the path in the user's folder, or where it was fetched from), planted (the kind of fault) and
    truth (`World.truth`). Only good rendered clips have a truth: the others show no known world, or do not show it unchanged.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = {"worlds": render_worlds, "folder": copy_folder, "table": copy_folder}
    left_out = ScratchMap(out.parent)  # what is not taken, and why
    count = planted = 0
    with open_partial(out / "clips.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for row in sources.get(params.clips.source, copy_collection)(params, track, out, left_out):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count, planted = count + 1, planted + (row["planted"] is not None)
    if params.clips.source != "worlds":
        with (out / "left_out.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"source": name, "why": why}) + "\n" for name, why in left_out.items())
    return {"clips": count, "planted": planted}


def render_worlds(params: Params, track: Track, out: Path, left_out: MutableMapping[str, str]) -> Iterator[Row]:
    """Render worlds to clips and yield their rows."""
    clips, size = params.clips, (params.video.height, params.video.width)
    settings = {name: getattr(clips, name) for name in ("count", "bad", "frames", "crf")} | {"fps": params.video.fps, "seed": params.seed}
    progress = track.progress(clips.count + clips.bad * len(PLANTED), unit="clip")
    for clip in render_clips(out, clips.worlds, size=size, **settings):
        yield make_row(clip.file, clip.caption) | {"planted": clip.planted, "truth": clip.truth}
        progress.update()


def copy_folder(params: Params, track: Track, out: Path, left_out: MutableMapping[str, str]) -> Iterator[Row]:
    """Copy a folder's videos, with those of its subfolders, in the order of their names, and yield their rows.

    A table's rows may name addresses too, which are fetched. An address that can't give a video is left out; if one broke off, the run
    is refused at its end, because another try would give other clips.
    """
    folder = params.clips.folder
    if folder is None or not folder.is_dir():
        raise ValueError(f"clips.folder is {folder}, which is no folder; name one with videos, or set clips.source to worlds")
    found = VideoFolder(folder, VIDEO_SUFFIXES)
    left_out.update((print_name(file.relative_to(folder)), why) for file, why in found.left_out)
    clips, table = params.clips, read_clip_table(params.clips.table) if params.clips.table else []
    addresses = [entry for entry in table if entry.is_address and clips.source == "table"]
    if addresses and clips.fetch is None:
        where = f"{clips.table} row {addresses[0].row} names {addresses[0].file}, an address, but clips.fetch is null"
        raise ValueError(f"{where}; state there what a file may cost, or download it into clips.folder and name the file")
    if next(found.videos, None) is None and not addresses:
        others = "".join(f" ({name} {why})" for name, why in islice(left_out.items(), 1))
        endings = " ".join(VIDEO_SUFFIXES)
        raise ValueError(f"clips.folder is {folder}, which has no video ({endings}){others}; put some there, or name another")
    fetcher = clips.fetch and AddressFetcher(FETCHED, clips.fetch, VIDEO_SUFFIXES, left_out)
    fetched = {entry.file: fetcher.place(entry.file) for entry in addresses if fetcher}
    total = sum(1 for _ in found.videos) if clips.source == "folder" else len(table)
    progress = track.progress(total, unit="clip")
    copied: dict[Path, bool] = {}  # of files that several rows of a table may name
    for name, file, entry in match_files(table, found, fetched, whole=clips.source == "folder"):
        if file is None:
            left_out[name] = f"is in row {entry.row if entry else 0} of {clips.table} and not in {folder}"
            continue
        source = name if entry in addresses else print_name(Path(name))
        # The id is a hash of the file's path in the folder, because the id decides whether a clip is held out, and a new file must not
        # move other clips.
        row = make_row(out / f"clip-{hash_name(source)}{file.suffix.lower()}", "", source)
        facts = entry.facts | {"id": row["id"] + entry.suffix} if entry else {}
        if (there := copied.get(file)) is None:
            there = fetcher.fetch(name, entry.checksum) if fetcher and entry in addresses else True
            there = there and copy_file(file, out / row["file"], source, left_out)
            copied |= {file: there} if clips.source == "table" else {}
        if there:
            yield row | ({} if "caption" in facts else read_caption(file, source)) | facts
        progress.update()
    if fetcher and fetcher.broken:
        way = f"what came is kept in {FETCHED}; or take them out of {clips.table}"
        raise ValueError(f"{len(fetcher.broken)} of {total} videos were not fetched, the first: {fetcher.broken[0]}: {way}")


def match_files(
    table: list[ClipEntry], found: VideoFolder, fetched: dict[str, Path], *, whole: bool
) -> Iterator[tuple[str, Path | None, ClipEntry | None]]:
    """Yield each clip's name, its file or None if there is none, and its row of a table; only a table's names are held in memory."""
    names = (file.relative_to(found.folder).as_posix() for file in found.videos)
    if not table:
        yield from ((name, found.folder / name, None) for name in names)
        return
    known = {name: found.folder / name for name in names} | fetched
    yield from ((name, known.get(name), entry) for name, entry in match_entries(table, known, whole=whole))


def copy_collection(params: Params, track: Track, out: Path, left_out: MutableMapping[str, str]) -> Iterator[Row]:
    """Fetch Sekai or UltraVideo, take the videos that its tables list, clips.count of them or all, and yield their rows."""
    clips = params.clips
    assert clips.fetch is not None  # the schema requires it for a collection
    reader = CollectionReader(clips.source, FETCHED / clips.source, clips.fetch)
    total = min(clips.count or len(reader.missing), len(reader.missing))
    progress = track.progress(total, unit="clip")
    for number, video in enumerate(reader, 1):
        row = make_row(out / f"clip-{hash_name(f'{clips.source}/{video.entry.file}')}.mp4", video.entry.caption or "", video.origin)
        with (out / row["file"]).open("wb") as file:
            shutil.copyfileobj(video.file, file)
        yield row | video.entry.facts | {"id": row["id"] + video.entry.suffix}
        progress.update()
        if number == total:
            break
    else:
        left_out.update((entry.file, f"is in no archive of {clips.source}") for entry in reader.missing.values())
    track.facts |= {"revision": reader.commit}


def copy_file(file: Path, place: Path, source: str, left_out: MutableMapping[str, str]) -> bool:
    """Copy a file and say whether it could be read; raise ValueError if the disk is full.

    # Choice: copied, not linked, because DVC makes files in its cache read-only, and through a link also the user's own file.
    """
    try:
        shutil.copyfile(file, place)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise ValueError(f"{source} could not be copied to {place.parent}: {error.strerror}; make room there") from None
        left_out[source] = f"can't be read ({error.strerror})"
        place.unlink(missing_ok=True)
        return False
    return True


def print_name(path: Path) -> str:
    """Return a path as text that JSON can hold, also where it is not UTF-8."""
    return path.as_posix().encode(errors="backslashreplace").decode()


def hash_name(source: str) -> str:
    """Return the hash of a clip's source that its id is made of."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def read_caption(file: Path, source: str) -> Row:
    """Read FILE.txt beside FILE.mp4, or else take the words of the name that its source ends in.

    Beside the caption, `note` says if it was in another encoding than UTF-8, and `refused` why the clip can't be used for its caption.
    """
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        name = unquote(urlsplit(source).path) if "://" in source else source
        return {"caption": " ".join(PurePosixPath(name).stem.replace("-", " ").replace("_", " ").split())}
    try:
        text, encoding = read_text_file(beside)
    except (OSError, ValueError) as error:
        return {"refused": str(error)}
    if not text.split():
        return {"refused": f"{beside.name} is empty; write {print_name(Path(file.name))}'s caption in it, or delete it to use the name"}
    return {"caption": " ".join(text.split())} | ({"note": f"caption read as {encoding}"} if encoding else {})


def make_row(file: Path, caption: str, source: str | None = None) -> Row:
    """Return the row of clips.jsonl of a clip whose video is this file of `out`."""
    return {"id": file.stem, "file": file.name, "caption": caption, "source": source, "planted": None, "truth": None}
