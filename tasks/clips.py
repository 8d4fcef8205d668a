"""Stage `clips`: make the clips that all later stages start from, rendered from worlds or copied from the user's folder.

Among rendered clips there are bad ones on purpose ("planted"), so that tests and the report can say whether the stage filter finds them.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cf_model.data import worlds
from cf_model.data.planted import WORSE_CRF, WRONG_FPS, draw_kinds, render_kind
from cf_model.data.video import UNREADABLE_WIDTHS, read_video, write_video
from tasks.files.json_lines import Row, dump_json_lines
from tasks.files.videos import VIDEO_SUFFIXES, list_videos
from tasks.params.schema import Params
from tasks.runner.track import Track


def run(params: Params, track: Track, *, out: Path) -> dict[str, float]:
    """Write the video files and clips.jsonl to `out`; return the numbers of all clips and of planted ones.

    A row has id, file, caption, source (the path in the user's folder), planted (the kind of fault) and truth (`World.truth`). Only good
    rendered clips have a truth: the others show no known world, or do not show it unchanged.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = list((copy_folder if params.clips.source == "folder" else render_worlds)(params, track, out))
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
        world, other = (worlds.draw_world(params.seed * 1_000_000 + 2 * i + j) for j in range(2))
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
    """Raise ValueError for a size that a world cannot be rendered in, or that decord would read wrongly."""
    height, width = params.video.height, params.video.width
    if height % 32 or width % 2 or width in UNREADABLE_WIDTHS:
        raise ValueError(
            f"video.height is {height} and video.width {width}; a world's height is a multiple of 32, "
            f"its width even and none of {sorted(UNREADABLE_WIDTHS)}, which decord misreads: use 32 and 32"
        )


def copy_folder(params: Params, track: Track, out: Path) -> Iterator[Row]:
    """Copy a folder's videos, with those of its subfolders, in the order of their names, and yield their rows."""
    folder = params.clips.folder
    if folder is None or not folder.is_dir():
        raise ValueError(f"clips.folder is {folder}, which is no folder; name one with videos, or set clips.source to worlds")
    files = list_videos(folder)
    if not files:
        raise ValueError(f"clips.folder is {folder}, which has no video ({' '.join(VIDEO_SUFFIXES)}); put some there, or name another")
    progress = track.progress(len(files), unit="clip")
    for file in files:
        source = file.relative_to(folder).as_posix()
        # The id is a hash of the file's path in the folder, because the id decides whether a clip is held out, and a new file must not
        # move other clips.
        name = hashlib.sha256(source.encode()).hexdigest()[:12]
        row = make_row(name, file.suffix.lower(), read_caption(file), source=source)
        # Choice: copied, not linked, because DVC makes files in its cache read-only, and through a link also the user's own file.
        shutil.copyfile(file, out / row["file"])
        progress.update()
        yield row


def read_caption(file: Path) -> str:
    """Read FILE.txt beside FILE.mp4, or else take the words of the file's name; an empty FILE.txt raises ValueError."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return " ".join(file.stem.replace("-", " ").replace("_", " ").split())
    words = beside.read_text(encoding="utf-8-sig", errors="replace").split()
    if not words:
        raise ValueError(f"{beside} is empty; write {file.name}'s caption in it, or delete it to use the name")
    return " ".join(words)


def make_row(name: str, suffix: str, caption: str, *, planted: str | None = None, source: str | None = None) -> Row:
    """Return a clip's row of clips.jsonl; `name` is the number or the hash in its id."""
    clip = f"clip-{name}"
    return {"id": clip, "file": clip + suffix, "caption": caption, "source": source, "planted": planted, "truth": None}
