"""What the stage `clips` takes from a folder that anyone may have filled, and what `cf why` says of it afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cf_model.data import worlds
from cf_model.data.clip_table import read_clip_table
from cf_model.data.video import write_video
from cf_model.data.video_folder import VideoFolder
from tasks import clips
from tasks import filter as filtering
from tasks.commands import why
from tasks.files.texts import read_text_file
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.params.yaml_file import Refused
from tests.test_clips import folder, rows


def film(path: Path, seed: int = 0, frames: int = 177) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, worlds.render_clip(worlds.draw_world(seed), frames, height=32, width=32, fps=16), fps=16, crf=20)
    return path


def run_clips(source: Path, out: Path) -> list[dict[str, object]]:
    clips.run(folder(source), MagicMock(), out=out)
    return rows(out / "clips.jsonl")


def test_linked_folders_are_read_and_loops_hidden_files_and_dangling_links_are_named(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for file in (source / "a.mp4", elsewhere / "b.MTS", elsewhere / "deep/c.3gp", source / ".hidden.mp4", source / "._a.mp4"):
        film(file.with_suffix(".mp4")).rename(file)
    (source / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(source)
    (source / "gone.mkv").symlink_to(tmp_path / "nowhere.mkv")
    (source / "a_again.mp4").symlink_to(source / "a.mp4")
    found = VideoFolder(source, VIDEO_SUFFIXES)
    assert [file.relative_to(source).as_posix() for file in found.videos] == ["a.mp4", "linked/b.MTS", "linked/deep/c.3gp"]
    left_out = {file.relative_to(source).as_posix(): why for file, why in found.left_out}
    assert left_out == {
        ".hidden.mp4": "is hidden",
        "._a.mp4": "is hidden",
        "a_again.mp4": "is a.mp4 under another name",
        "gone.mkv": "is a link to nothing",
        "linked/loop": "is a link to a folder that it is in",
    }
    assert len(run_clips(source, tmp_path / "clips")) == 3
    assert {row["source"]: row["why"] for row in rows(tmp_path / "clips/left_out.jsonl")} == left_out


def test_thousands_of_links_to_a_file_are_one_clip(tmp_path: Path) -> None:
    film(tmp_path / "raw/a.mp4")
    for number in range(10_000):
        os.symlink("a.mp4", tmp_path / f"raw/link-{number:05d}.mp4")
    assert len(run_clips(tmp_path / "raw", tmp_path / "clips")) == 1
    assert len(rows(tmp_path / "clips/left_out.jsonl")) == 10_000


NAMES = ['the cat\'s "hat".mp4', "кошка на окне.mp4", "猫.mp4", "line\nend.mp4", os.fsdecode(b"caf\xe9.mp4"), "-rf.mp4", "%s${x} a cat.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds(tmp_path: Path, name: str) -> None:
    film(tmp_path / "raw" / "plain.mp4").rename(tmp_path / "raw" / name)
    [row] = run_clips(tmp_path / "raw", tmp_path / "clips")
    assert (tmp_path / "clips" / str(row["file"])).is_file() and row["caption"]
    p = folder(tmp_path / "raw")
    filtering.run(p, MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    assert rows(tmp_path / "manifest.jsonl")[0]["kept"]


@pytest.mark.parametrize(
    ("content", "caption", "note"),
    [
        ("ein Café – schön".encode("cp1252"), "ein Café – schön", "caption read as cp1252"),
        ("ein Café".encode("utf-16"), "ein Café", "caption read as utf-16"),
        ("a red disc".encode("utf-16-le"), "a red disc", "caption read as utf-16-le"),
        ("a red disc".encode("utf-16-be"), "a red disc", "caption read as utf-16-be"),
        ("\ufeffкошка".encode(), "кошка", None),
    ],
)
def test_captions_in_other_encodings_are_read_and_said(tmp_path: Path, content: bytes, caption: str, note: str | None) -> None:
    film(tmp_path / "raw/a.mp4")
    (tmp_path / "raw/a.txt").write_bytes(content)
    [row] = run_clips(tmp_path / "raw", tmp_path / "clips")
    assert (row["caption"], row.get("note")) == (caption, note)


FOREIGN = ["кошка на окне".encode("cp1251"), b"\x00\x01\x02\x03" * 50, bytes(range(256)), "猫".encode("shift-jis")]


@pytest.mark.parametrize("content", FOREIGN)
def test_captions_in_an_unknown_encoding_refuse_their_clip_by_name(tmp_path: Path, content: bytes) -> None:
    for name in ("a.mp4", "the cat.mp4"):
        film(tmp_path / "raw" / name, ord(name[0]))
    (tmp_path / "raw/a.txt").write_bytes(content)
    run_clips(tmp_path / "raw", tmp_path / "clips")
    filtering.run(folder(tmp_path / "raw"), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    bad, good = rows(tmp_path / "manifest.jsonl")
    assert good["kept"] and (bad["reason"], bad["source"]) == ("caption", "a.mp4")
    assert bad["rule"] == "a.txt is no text in UTF-8, UTF-16 or cp1252; save it as UTF-8"
    with pytest.raises(ValueError, match="is no text"):
        read_text_file(tmp_path / "raw/a.txt")


def test_a_clip_that_vanishes_after_it_was_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mp4", "cats.mp4"):
        film(tmp_path / "raw" / name, ord(name[0]))
    copy = clips.shutil.copyfile

    def copy_or_miss(source: Path, place: Path) -> None:
        if source.name == "b.mp4":
            source.unlink()
        copy(source, place)

    monkeypatch.setattr(clips.shutil, "copyfile", copy_or_miss)
    listed = run_clips(tmp_path / "raw", tmp_path / "clips")
    assert [row["source"] for row in listed] == ["a.mp4", "cats.mp4"]
    assert rows(tmp_path / "clips/left_out.jsonl") == [{"source": "b.mp4", "why": "can't be read (No such file or directory)"}]
    (tmp_path / "clips" / str(listed[0]["file"])).unlink()
    filtering.run(folder(tmp_path / "raw"), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    gone, here = rows(tmp_path / "manifest.jsonl")
    assert here["kept"] and gone["rule"] == "a.mp4 is not there; check its name"


TABLES = {
    "csv": 'videoFile,caption,start,end\nb.mp4,"a bar, blue",0.5,11.6\nb.mp4,late,60,\na,a red disc,,\ngone.mp4,x y,,\n',
    "jsonl": '{"path": "b.mp4", "text": "a bar, blue", "start": 0.5, "end": 11.6}\n{"path": "b.mp4", "text": "late", "start": 60}\n'
    '{"path": "a", "text": "a red disc"}\n{"path": "gone.mp4", "text": "x y"}\n',
}


def write_table(raw: Path, kind: str) -> Path:
    path = raw / f"clips.{kind}"
    if kind == "parquet":
        rows = [json.loads(line) for line in TABLES["jsonl"].splitlines()]
        names = ("path", "text", "start", "end")
        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        path.write_text(TABLES[kind])
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_says_which_clips_with_which_captions_and_which_seconds_of_them(tmp_path: Path, kind: str) -> None:
    film(tmp_path / "raw/a.mp4", 1)
    film(tmp_path / "raw/b.mp4", 2, 200)
    film(tmp_path / "raw/more_of_it.mp4", 3)
    p = folder(tmp_path / "raw")
    settings = {"source": "table", "table": write_table(tmp_path / "raw", kind)}
    p.clips = p.clips.model_copy(update=settings)
    assert clips.run(p, MagicMock(), out=tmp_path / "clips")["clips"] == 3
    listed = rows(tmp_path / "clips/clips.jsonl")
    assert [(row["source"], row["caption"]) for row in listed] == [("b.mp4", "a bar, blue"), ("b.mp4", "late"), ("a.mp4", "a red disc")]
    assert len({row["id"] for row in listed}) == 3 and len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    assert [row["source"] for row in rows(tmp_path / "clips/left_out.jsonl")] == ["gone.mp4"]
    filtering.run(p, MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    part, late, whole = rows(tmp_path / "manifest.jsonl")
    assert part["kept"] and (part["start"], part["length"], part["seconds"]) == (8, 177, 11.0625)
    assert late["reason"] == "too_short" and late["rule"].endswith("it has 0")
    assert whole["kept"] and (whole["start"], whole["length"]) == (None, None)
    p.clips = p.clips.model_copy(update={"source": "folder"})
    clips.run(p, MagicMock(), out=tmp_path / "all")
    captions = {row["source"]: row["caption"] for row in rows(tmp_path / "all/clips.jsonl")}
    assert captions == {"a.mp4": "a red disc", "b.mp4": "late", "more_of_it.mp4": "more of it"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("name,caption\na,b\n", "row 1 names no file"),
        ("file,caption\n/etc/passwd,b\n", "not below clips.folder"),
        ("file,caption\n../a.mp4,b\n", "not below clips.folder"),
        ("file,md5\na.mp4,12\n", "row 1 has the checksum '12'; write a sha256 or md5"),
        ("file,start,end\na.mp4,5,4\n", "row 1 ends at 4 s and begins at 5 s"),
        ("file,start\na.mp4,soon\n", "start is 'soon'; it must be a number"),
        ("file,caption\n", "has no rows"),
        ('file,caption\na.mp4,"b', "is no CSV"),
    ],
)
def test_tables_that_can_not_be_used_are_refused_in_a_sentence(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "clips.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/clips.csv[^\n]*{why}[^\n]*$"):
        read_clip_table(tmp_path / "clips.csv")


def test_why_explains_every_fate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "raw/good.mp4")
    film(tmp_path / "raw/short.mp4", 5, 90)
    write_video(tmp_path / "raw/still.mp4", [np.full((32, 32, 3), 90, np.uint8)] * 180, fps=16, crf=12)
    (tmp_path / "raw/notes.mp4").write_text("no video")
    (tmp_path / "raw/gone.mkv").symlink_to(tmp_path / "nowhere.mkv")
    monkeypatch.chdir(tmp_path)
    p = folder(tmp_path / "raw")
    clips.run(p, MagicMock(), out=Path("data/clips"))
    filtering.run(p, MagicMock(), clips=Path("data/clips"), out=Path("data/manifest.jsonl"))
    made = {row["source"]: row for row in rows(Path("data/manifest.jsonl"))}
    id_, path = made["short.mp4"]["id"], f"data/clips/{made['short.mp4']['file']}"
    said = {}
    for name in ("good.mp4", "short.mp4", "still.mp4", "notes.mp4", "gone.mkv", id_, path, str(tmp_path / "raw/good.mp4")):
        why.explain_file(name, p.filter, Path("data"))
        said[name] = capsys.readouterr().out
    assert "accepted" in said["good.mp4"] and "motion" in said["good.mp4"] and said["good.mp4"] == said[str(tmp_path / "raw/good.mp4")]
    assert "rejected, too_short: seconds > 10.0, 161 frames at 16 fps; it has 90" in said["short.mp4"] == said[id_] == said[path]
    assert "rejected, frozen" in said["still.mp4"] and "rejected, unreadable: " in said["notes.mp4"]
    assert "left out: is a link to nothing" in said["gone.mkv"]
    with pytest.raises(Refused, match=r"other\.mp4 is in neither"):
        why.explain_file("other.mp4", p.filter, Path("data"))


def test_why_explains_a_run_that_was_refused_and_whose_manifest_the_runner_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "raw/short.mp4", 5, 90)
    monkeypatch.chdir(tmp_path)
    p, out = folder(tmp_path / "raw"), Path("data/manifest.jsonl")
    clips.run(p, MagicMock(), out=Path("data/clips"))
    with pytest.raises(ValueError, match=r"the first: short\.mp4, seconds > 10\.0, 161 frames"):
        filtering.run(p, MagicMock(), clips=Path("data/clips"), out=out)
    out.unlink()
    why.explain_file("raw/short.mp4", p.filter, Path("data"))
    assert "rejected, too_short: seconds > 10.0, 161 frames at 16 fps; it has 90" in capsys.readouterr().out
    film(tmp_path / "raw/long.mp4", 6)
    clips.run(p, MagicMock(), out=Path("data/clips"))
    filtering.run(p, MagicMock(), clips=Path("data/clips"), out=out)
    why.explain_file("raw/long.mp4", p.filter, Path("data"))
    assert "accepted" in capsys.readouterr().out


def test_endings_in_any_case_are_videos(tmp_path: Path) -> None:
    for number, suffix in enumerate(VIDEO_SUFFIXES):
        (tmp_path / f"{number}{suffix.upper()}").write_bytes(b"x")
    assert len(list(VideoFolder(tmp_path, VIDEO_SUFFIXES).videos)) == len(VIDEO_SUFFIXES)
