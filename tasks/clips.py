"""Stage `clips`: make the clips that all later stages start from, rendered from worlds or copied from the user's folder.

Among rendered clips there are bad ones on purpose ("planted"), so that tests and the report can say whether the stage filter finds them.
"""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cf_model.data import worlds
from cf_model.data.clip_table import ClipEntry, read_clip_table
from cf_model.data.planted import WORSE_CRF, WRONG_FPS, draw_kinds, render_kind
from cf_model.data.video import write_video
from cf_model.data.video_reader import read_video
from tasks.files.json_lines import Row, dump_json_lines
from tasks.files.texts import read_text_file
from tasks.files.videos import VIDEO_SUFFIXES, look_for_videos
from tasks.params.schema import Params
from tasks.runner.track import Track

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # not the clip's


def run(params: Params, track: Track, *, out: Path) -> dict[str, float]:
    """Write the video files and clips.jsonl to `out`; return the numbers of all clips and of planted ones.

    A row has id, file, caption, source (the path in the user's folder), planted (the kind of fault) and truth (`World.truth`). Only good
    rendered clips have a truth: the others show no known world, or do not show it unchanged.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = list((render_worlds if params.clips.source == "worlds" else copy_folder)(params, track, out))
    (out / "clips.jsonl").write_text(dump_json_lines(rows, ensure_ascii=False), encoding="utf-8")
    return {"clips": len(rows), "planted": sum(row["planted"] is not None for row in rows)}


def render_worlds(params: Params, track: Track, out: Path) -> Iterator[Row]:
    """Render worlds to clips and yield their rows. The kinds are shuffled, because otherwise a clip's number would tell its kind."""
    fps, size, clips = params.video.fps, (params.video.height, params.video.width), params.clips
    check_size(params)
    rng = np.random.default_rng(params.seed)
    kinds = draw_kinds(clips.count, clips.bad, rng)
    progress = track.progress(len(kinds), unit="clip")
    good: list[Row] = []
    for i, kind in enumerate(kinds):
        # Each clip has two seeds of worlds for itself, because a hard cut needs a second world. Each value of params.seed has a million
        # seeds of worlds, so runs of different seeds share none.
        world, other = (worlds.draw_world(params.seed * 1_000_000 + 2 * i + j, clips.worlds) for j in range(2))
        row = make_row(f"{i:05d}", ".mp4", world.caption, planted=kind)
        path, crf = out / row["file"], clips.crf
        if kind == "duplicate":
            twin = good[rng.integers(len(good))]
            row["caption"], crf = twin["caption"], min(51, crf + WORSE_CRF)
            video = read_video(out / twin["file"], height=size[0], width=size[1], fps=fps)
        else:
            video = render_kind(kind, world, other, clips.frames, size, fps, rng)
        write_video(path, video, fps=WRONG_FPS if kind == "wrong_fps" else fps, crf=crf)
        if kind == "truncated":
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * rng.uniform(0.3, 0.9))])
        if kind is None:
            row["truth"] = world.truth(clips.frames, fps)
            good.append(row)
        progress.update()
        yield row


def check_size(params: Params) -> None:
    """Raise ValueError for a size that a world cannot be rendered in."""
    height, width = params.video.height, params.video.width
    if height % 32 or width % 2:
        sizes = f"video.height is {height} and video.width {width}"
        raise ValueError(f"{sizes}; a world's height is a multiple of 32, its width even: use 32 and 32")


def copy_folder(params: Params, track: Track, out: Path) -> Iterator[Row]:
    """Copy a folder's videos, with those of its subfolders, in the order of their names, and yield their rows."""
    folder = params.clips.folder
    if folder is None or not folder.is_dir():
        raise ValueError(f"clips.folder is {folder}, which is no folder; name one with videos, or set clips.source to worlds")
    found = look_for_videos(folder)
    left_out = {print_name(file.relative_to(folder)): why for file, why in found.left_out.items()}
    if not found.videos:
        others = f" ({next(iter(left_out))} {next(iter(left_out.values()))})" if left_out else ""
        endings = " ".join(VIDEO_SUFFIXES)
        raise ValueError(f"clips.folder is {folder}, which has no video ({endings}){others}; put some there, or name another")
    entries = list_entries(params, found.videos, folder, left_out)
    progress = track.progress(len(entries), unit="clip")
    copied: dict[Path, bool] = {}
    for file, entry in entries:
        source = print_name(file.relative_to(folder))
        # The id is a hash of the file's path in the folder, because the id decides whether a clip is held out, and a new file must not
        # move other clips.
        name = hashlib.sha256(source.encode()).hexdigest()[:12]
        row = make_row(name, file.suffix.lower(), "", source=source) | (read_caption(file) if entry is None or not entry.caption else {})
        if file not in copied:
            copied[file] = copy_file(file, out / row["file"], source, left_out)
        if copied[file]:
            yield row | (describe_entry(row["id"], entry) if entry else {})
        progress.update()
    (out / "left_out.jsonl").write_text(dump_json_lines({"source": name, "why": why} for name, why in left_out.items()), encoding="utf-8")


def list_entries(params: Params, videos: list[Path], folder: Path, left_out: dict[str, str]) -> list[tuple[Path, ClipEntry | None]]:
    """Return the videos with their rows of the table, if there is one; of source `table` only what it lists, in its order."""
    if params.clips.table is None:
        return [(file, None) for file in videos]
    listed, known = read_clip_table(params.clips.table), {file.relative_to(folder).as_posix(): file for file in videos}
    names = {file.stem: name for name, file in known.items()}  # collections name a clip without its ending
    entries = [(known.get(entry.file) or known.get(names.get(entry.file, "")), entry) for entry in listed]
    if params.clips.source == "folder":
        by_file = {file: entry for file, entry in entries if file}
        return [(file, by_file.get(file)) for file in videos]
    left_out |= {entry.file: f"is in row {entry.row} of {params.clips.table} and not in {folder}" for file, entry in entries if not file}
    return [(file, entry) for file, entry in entries if file]


def describe_entry(clip: str, entry: ClipEntry) -> Row:
    """Return what a row of the table changes in a clip's row: caption, and the seconds it takes, of which its id tells too."""
    row: Row = {"caption": entry.caption} if entry.caption else {}
    if entry.start is not None or entry.end is not None:
        end = "end" if entry.end is None else f"{entry.end:g}"
        row |= {"id": f"{clip}-{entry.start or 0:g}-{end}", "from": entry.start, "to": entry.end}
    return row


def copy_file(file: Path, place: Path, source: str, left_out: dict[str, str]) -> bool:
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


def read_caption(file: Path) -> Row:
    """Read FILE.txt beside FILE.mp4, or else take the words of the file's name.

    Beside the caption, `note` says if it was in another encoding than UTF-8, and `refused` why the clip can't be used for its caption.
    """
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return {"caption": " ".join(print_name(Path(file.stem)).replace("-", " ").replace("_", " ").split())}
    try:
        text, encoding = read_text_file(beside)
    except (OSError, ValueError) as error:
        return {"refused": str(error)}
    if not text.split():
        return {"refused": f"{beside.name} is empty; write {print_name(Path(file.name))}'s caption in it, or delete it to use the name"}
    return {"caption": " ".join(text.split())} | ({"note": f"caption read as {encoding}"} if encoding else {})


def make_row(name: str, suffix: str, caption: str, *, planted: str | None = None, source: str | None = None) -> Row:
    """Return a clip's row of clips.jsonl; `name` is the number or the hash in its id."""
    clip = f"clip-{name}"
    return {"id": clip, "file": clip + suffix, "caption": caption, "source": source, "planted": planted, "truth": None}
