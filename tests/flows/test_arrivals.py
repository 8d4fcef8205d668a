"""New clips go in once, whatever they are called, and nothing in the inbox can fail a night."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.night.inbox import copy_new_clips


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox/sub").mkdir(parents=True)
    (tmp_path / "inbox/a.mp4").write_bytes(b"a")
    (tmp_path / "inbox/sub/b.mp4").write_bytes(b"b")
    (tmp_path / "inbox/sub/b.txt").write_text("a caption")
    return tmp_path / "inbox"


def names(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_new_goes_in_once_and_the_inbox_stays(inbox: Path, tmp_path: Path) -> None:
    before = names(inbox)
    assert copy_new_clips(inbox, tmp_path / "raw", settle=0).copied == ["a.mp4", "sub/b.mp4", "sub/b.txt"]
    assert names(tmp_path / "raw") == before == names(inbox)
    again = copy_new_clips(inbox, tmp_path / "raw", settle=0)
    assert (again.copied, again.duplicates, again.turned_away) == ([], 3, {})
    (inbox / "a.mp4").rename(inbox / "renamed.mp4")
    assert copy_new_clips(inbox, tmp_path / "raw", settle=0).copied == [], "known by its content"


def test_another_clip_of_a_known_name_replaces_nothing(inbox: Path, tmp_path: Path) -> None:
    copy_new_clips(inbox, tmp_path / "raw", settle=0)
    (inbox / "a.mp4").write_bytes(b"another")
    (inbox / "a.txt").write_text("its caption")
    taken = copy_new_clips(inbox, tmp_path / "raw", settle=0).copied
    assert len(taken) == 2 and taken[0].startswith("a-") and taken[1] == taken[0].replace(".mp4", ".txt")
    assert (tmp_path / "raw/a.mp4").read_bytes() == b"a" and (tmp_path / "raw" / taken[0]).read_bytes() == b"another"


def test_a_caption_can_be_corrected(inbox: Path, tmp_path: Path) -> None:
    copy_new_clips(inbox, tmp_path / "raw", settle=0)
    (inbox / "sub/b.txt").write_text("a better caption")
    assert copy_new_clips(inbox, tmp_path / "raw", settle=0).copied == ["sub/b.txt"]
    assert (tmp_path / "raw/sub/b.txt").read_text() == "a better caption"


def test_two_captions_may_say_the_same(inbox: Path, tmp_path: Path) -> None:
    (inbox / "a.txt").write_text("a caption")
    copy_new_clips(inbox, tmp_path / "raw", settle=0)
    assert (tmp_path / "raw/a.txt").read_text() == (tmp_path / "raw/sub/b.txt").read_text() == "a caption"


def test_what_can_not_be_taken_is_turned_away_with_a_reason(inbox: Path, tmp_path: Path) -> None:
    (inbox / "empty.mp4").write_bytes(b"")
    (inbox / "link.mp4").symlink_to("/etc/passwd")
    (inbox / "dead.mp4").symlink_to("nowhere")
    (inbox / "loop").symlink_to(inbox)
    os.mkfifo(inbox / "pipe.mp4")
    (inbox / "upload.mp4.part").write_bytes(b"x")
    (inbox / "line\nbreak.mp4").write_bytes(b"x")
    (inbox / "a.txt").write_text(" \n")
    (inbox / "c.txt").write_bytes("кошка на окне".encode("cp1251"))
    (inbox / ".hidden.mp4").write_bytes(b"h")
    found = copy_new_clips(inbox, tmp_path / "raw", settle=0)
    assert found.copied == ["a.mp4", "sub/b.mp4", "sub/b.txt"]
    gone = ["a.txt", "c.txt", "dead.mp4", "empty.mp4", "line\nbreak.mp4", "link.mp4", "loop", "pipe.mp4", "upload.mp4.part"]
    assert sorted(found.turned_away) == gone
    assert found.turned_away["c.txt"] == "is no text in UTF-8, UTF-16 or cp1252; save it as UTF-8"
    assert set(names(tmp_path / "raw")) == {"a.mp4", "sub/b.mp4", "sub/b.txt"}


def test_an_upload_that_goes_on_waits_for_the_next_night(inbox: Path, tmp_path: Path) -> None:
    for file in inbox.rglob("*.*"):
        os.utime(file, (0, time.time() - 120))
    os.utime(inbox / "a.mp4")
    found = copy_new_clips(inbox, tmp_path / "raw", settle=60)
    assert found.copied == ["sub/b.mp4", "sub/b.txt"] and "the next night takes it" in found.turned_away["a.mp4"]


def test_no_inbox(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nightly\.inbox is .*, which is no folder"):
        copy_new_clips(tmp_path / "absent", tmp_path / "raw", settle=0)


def test_a_name_that_is_no_utf8_is_turned_away_and_can_be_written_down(inbox: Path, tmp_path: Path) -> None:
    with open(os.fsencode(inbox) + b"/caf\xe9.mp4", "wb") as file:
        file.write(b"x")
    (name,) = copy_new_clips(inbox, tmp_path / "raw", settle=0).turned_away
    assert name.encode() == b"caf\\udce9.mp4"


def test_only_videos_and_captions_go_in(inbox: Path, tmp_path: Path) -> None:
    for name in ("README.md", "Thumbs.db", "a.TXT"):
        (inbox / name).write_text("x")
    (inbox / "B.MOV").write_text("B")
    found = copy_new_clips(inbox, tmp_path / "raw", settle=0)
    assert sorted(found.turned_away) == ["README.md", "Thumbs.db", "a.TXT"] and "B.MOV" in found.copied


def test_captions_that_say_the_same_are_known_the_next_night(inbox: Path, tmp_path: Path) -> None:
    (inbox / "a.txt").write_text("a caption")
    copy_new_clips(inbox, tmp_path / "raw", settle=0)
    again = copy_new_clips(inbox, tmp_path / "raw", settle=0)
    assert (again.copied, again.duplicates) == ([], 4)


def test_of_a_clip_that_is_there_twice_the_first_caption_stays(inbox: Path, tmp_path: Path) -> None:
    (inbox / "copy.mp4").write_bytes(b"a")
    (inbox / "a.txt").write_text("of a")
    (inbox / "copy.txt").write_text("of its copy")
    for _ in range(2):
        found = copy_new_clips(inbox, tmp_path / "raw", settle=0)
        assert found.turned_away == {"copy.txt": "is the caption of a copy, whose caption is a.txt"}
        assert (tmp_path / "raw/a.txt").read_text() == "of a" and not (tmp_path / "raw/copy.mp4").exists()


def test_a_time_that_is_still_to_come_keeps_no_clip_out(inbox: Path, tmp_path: Path) -> None:
    os.utime(inbox / "a.mp4", (0, time.time() + 1e7))
    assert "a.mp4" in copy_new_clips(inbox, tmp_path / "raw", settle=60).turned_away, "it was written just now"
    time.sleep(0.3)
    assert "a.mp4" in copy_new_clips(inbox, tmp_path / "raw", settle=0.2).copied


def test_a_full_disk_fails_the_night_and_leaves_nothing_half_copied(inbox: Path, tmp_path: Path) -> None:
    (inbox / "a.mp4").write_bytes(b"x" * 500_000)
    code = "import sys; from pathlib import Path; from flows.night import inbox; inbox.copy_new_clips(*map(Path, sys.argv[1:]), settle=0)"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run([sys.executable, "-c", code, str(inbox), str(tmp_path / "raw")], preexec_fn=small, capture_output=True, text=True)
    assert "RuntimeError: a.mp4 could not be copied" in done.stderr
    assert names(tmp_path / "raw") == {}
