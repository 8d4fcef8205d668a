"""Folders and files that no one should have to think of: each is read, or refused in one sentence, and nothing of the user's is touched.

Other bad input: wrong encodings, names, links and vanishing files in tests/test_sources.py, damaged copies in test_fuzz.py.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.data.clip_manifest import ManifestDraft
from tasks import clips, encode
from tasks import filter as filtering
from tests.test_clips import folder, rows
from tests.test_sources import film


@pytest.mark.parametrize("content", [{}, {"a.txt": "one", "b/c.md": "two", "d.jpg": "three"}])
def test_a_folder_without_a_video_is_a_sentence(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_text(text)
    (tmp_path / "raw").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"^clips\.folder is .*raw, which has no video [^\n]*; put some there, or name another$"):
        clips.run(folder(tmp_path / "raw"), MagicMock(), out=tmp_path / "clips")


def test_text_called_a_video_is_rejected_by_name(tmp_path: Path) -> None:
    film(tmp_path / "raw/good one.mp4")
    (tmp_path / "raw/text.mp4").write_text("a video, or so it says\n" * 100)
    clips.run(folder(tmp_path / "raw"), MagicMock(), out=tmp_path / "clips")
    filtering.run(folder(tmp_path / "raw"), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    fates = {row["source"]: row["rule"] for row in rows(tmp_path / "manifest.jsonl")}
    assert fates["good one.mp4"] is None and fates["text.mp4"] == "text.mp4 is not a video, or has lost its header; replace it"


def test_a_read_only_folder_is_read_and_its_copies_can_be_written(tmp_path: Path) -> None:
    path = film(tmp_path / "raw/a red disc.mp4")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in path.parent.iterdir())
    try:
        clips.run(folder(tmp_path / "raw"), MagicMock(), out=tmp_path / "clips")
        filtering.run(folder(tmp_path / "raw"), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    finally:
        path.parent.chmod(0o755)
    [row] = rows(tmp_path / "manifest.jsonl")
    assert row["kept"] and (tmp_path / "clips" / row["file"]).stat().st_mode & 0o200
    assert sorted((file.name, file.stat().st_mtime_ns) for file in path.parent.iterdir()) == before


def test_a_clip_that_vanishes_between_the_filter_and_encode_is_a_sentence_and_nothing_is_half_written(tmp_path: Path) -> None:
    for seed, name in enumerate(("a red disc.mp4", "b blue bar.mp4")):
        film(tmp_path / "raw" / name, seed)
    p = folder(tmp_path / "raw")
    clips.run(p, MagicMock(), out=tmp_path / "clips")
    filtering.run(p, MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    save_codec(LinearCodec(channels=4, width=4), tmp_path / "codec")
    gone = rows(tmp_path / "manifest.jsonl")[1]["file"]
    (tmp_path / "clips" / gone).unlink()
    given = {"clips": tmp_path / "clips", "manifest": tmp_path / "manifest.jsonl", "codec": tmp_path / "codec"}
    with pytest.raises(ValueError, match=rf"^{gone} is not there; check its name$"):
        encode.run(p, MagicMock(work=tmp_path / "work"), out=tmp_path / "latents", **given)
    assert not (tmp_path / "latents").exists()


def test_the_longest_clip_does_not_count_for_training_when_it_is_held_out() -> None:
    draft = ManifestDraft()
    for number, (latents, split) in enumerate([(40, "train"), (52, "heldout"), (60, None)]):
        facts = {"id": f"{number}", "file": f"{number}.mp4", "caption": "a", "reason": None, "seconds": 10.0}
        draft.add(facts | {"kept": split is not None, "latents": latents, "split": split})
    draft.check_longest(("base.window", 40))
    with pytest.raises(ValueError, match=r"base\.window is 45 latents, so 177 frames, but the longest training clip has 40 latents"):
        draft.check_longest(("base.window", 45))
