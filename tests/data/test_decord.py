"""decord, where it is asked for, gives the frames that PyAV gives; where it can't be trusted, PyAV gives them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from cf_model.data import clip_reader, video_reader
from cf_model.data.clip_reader import ClipReader
from cf_model.data.decord_reader import CODECS, DecordFile
from tasks.params.schema import Encode
from tests.data.files import KINDS, Film, draw_film, write_film

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
SIZE = {"height": 64, "width": 64, "fps": 16}
needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="needs decord")
READ = {("mp4", "libx264"), ("mp4", "libx265"), ("mov", "libx264"), ("matroska", "libx264"), ("matroska", "libx265")}
READ |= {("matroska", "libvpx-vp9"), ("webm", "libvpx-vp9")}


def read_by_decord(path: Path, **size: int) -> np.ndarray:
    pieces = video_reader.read_pieces(path, **(SIZE | size), size=32, opener=DecordFile)  # type: ignore[arg-type]
    return np.concatenate(list(pieces))


@needs_decord
@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(film=draw_film())
def test_decord_gives_the_frames_of_pyav_to_the_bit_or_none(tmp_path: Path, film: Film) -> None:
    """Over containers, codecs, rates, beginnings and variable rates, at the film's own size."""
    path = tmp_path / f"film.{KINDS[film.container][0]}"
    write_film(path, *film)
    expected = video_reader.read_video(path, **SIZE)  # type: ignore[arg-type]
    if (film.container, film.codec) not in READ:
        with pytest.raises(ValueError, match=r"^film\.\w+ is read by PyAV, because decord may be wrong about"):
            read_by_decord(path)
    else:
        assert np.array_equal(read_by_decord(path), expected)


@needs_decord
@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("av1_video.mkv", "libdav1d"),
        ("bt709_full_range.mp4", "its first frame"),
        ("h264_10bits.mp4", "its first frame"),
        ("rotated_90.mov", "its first frame"),
        ("mixkit-a-boat-sailing-in-the-bay-1941.mp4", None),
        ("flipping_a_pancake.mkv", None),
    ],
)
def test_real_files(name: str, why: str | None) -> None:
    """Of the model's size the pixels are PyAV's; scaled ones differ a little, because decord's pixels are RGB before they are scaled."""
    if why:
        with pytest.raises(ValueError, match=why):
            read_by_decord(CLIPS / name)
        return
    seen = read_by_decord(CLIPS / name, height=480, width=832)
    expected = video_reader.read_video(CLIPS / name, height=480, width=832, fps=16)
    assert seen.shape == expected.shape
    assert np.array_equal(seen, expected) or (name.startswith("flipping") and np.abs(seen.astype(int) - expected).mean() < 2)


class BrokenReader:
    """A reader that gives some pieces and then fails, as a decoder does that crashes."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def stream(self, path: Path, **how: Any) -> Iterator[np.ndarray]:
        for number, piece in enumerate(video_reader.read_pieces(path, **how)):
            if number == self.pieces:
                raise ValueError("it crashed")
            yield piece

    def end(self) -> None:
        pass


@pytest.mark.parametrize("pieces", [0, 2, 9])
@pytest.mark.parametrize("window", [{}, {"start": 11, "length": 70}])
def test_pyav_goes_on_where_the_first_decoder_stopped(
    pieces: int, window: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_reader, "PIECE", 16)
    write_film(tmp_path / "a.mkv", "matroska", "libx264", Fraction(25), range(150))
    row = {"file": "a.mkv"} | window
    with ClipReader(tmp_path, SIZE, "decord") as reader, ClipReader(tmp_path, SIZE) as usual:
        reader.first = BrokenReader(pieces)  # type: ignore[assignment]
        seen, expected = (np.concatenate([piece[0] for piece in one.read(row)]) for one in (reader, usual))
    assert np.array_equal(seen, expected) and len(seen) > 60
    assert (reader.delivered, usual.delivered) == ("decord" if pieces else "pyav", "pyav")


def test_decord_that_is_not_installed_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"decord is not installed; pip install decord==0\.6\.0, or write pyav"):
        Encode(shard_mib=1.0, dtype="float32", decoder="decord")
    assert Encode(shard_mib=1.0, dtype="float32", decoder="pyav").decoder == "pyav" and "h264" in CODECS
