from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cf_model.data import video, worlds

CLIPS = Path(__file__).parents[3] / "shared" / "clips"


def pan(frames: int, *, fps: int = 16, size: int = 32, seed: int = 0) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(seed), frames, height=size, width=size, fps=fps)


def test_written_frames_come_back_in_order_and_number(tmp_path: Path) -> None:
    frames = pan(97, fps=4)
    assert video.write_video(tmp_path / "a.mp4", iter(frames), fps=16, crf=12) == 97
    back = video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16)
    assert back.shape == frames.shape and back.dtype == np.uint8
    away = np.abs(back[:, None].astype(np.int16) - frames[None]).mean((2, 3, 4))
    assert (away.argmin(1) == np.arange(97)).all() and away.diagonal().max() < 8  # 4:2:0 costs colour at 32 pixels
    assert video.probe_video(tmp_path / "a.mp4") == video.VideoFacts(frames=97, fps=16.0, width=32, height=32)


def test_same_size_and_rate_is_what_an_independent_decoder_sees(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", pan(40, size=64), fps=16, crf=20)
    with av.open(str(tmp_path / "a.mp4")) as container:
        theirs = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    ours = video.read_video(tmp_path / "a.mp4", height=64, width=64, fps=16)
    assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.parametrize("size", [32, 64, 96])
def test_same_frames_same_bytes_whatever_was_in_memory(tmp_path: Path, size: int) -> None:
    """New memory is filled with a different byte each time; with x264's defaults 64 x 64 has five results in twelve."""
    libc, fill = ctypes.CDLL("libc.so.6"), -6  # M_PERTURB
    frames, seen = pan(60, size=size), set()
    try:
        for i in range(12):
            libc.mallopt(fill, 37 * i % 256)
            video.write_video(tmp_path / f"{'a' * (i + 1)}.mp4", frames, fps=16, crf=12)
            seen.add((tmp_path / f"{'a' * (i + 1)}.mp4").read_bytes())
    finally:
        libc.mallopt(fill, 0)
    assert len(seen) == 1


def test_a_failing_stream_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", pan(20), fps=16, crf=12)
    before = (tmp_path / "a.mp4").read_bytes()

    def broken() -> Iterator[np.ndarray]:
        yield from pan(10)
        raise RuntimeError("the model went away")

    with pytest.raises(RuntimeError, match="went away"):
        video.write_video(tmp_path / "a.mp4", broken(), fps=16, crf=12)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 32, 32, 3), np.uint8), np.zeros((2, 31, 32, 3), np.uint8), [np.zeros((s, 32, 3), np.uint8) for s in (32, 64)]],
)
def test_frames_that_no_mp4_can_hold_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4"):
        video.write_video(tmp_path / "a.mp4", frames, fps=16, crf=12)
    assert not list(tmp_path.iterdir())


def test_another_rate_takes_the_nearest_frames_in_time(tmp_path: Path) -> None:
    """Frame i is as bright as i, so a frame tells its own time."""
    levels = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None, None, None] * 5, (48, 32, 32, 3))
    video.write_video(tmp_path / "a.mp4", levels, fps=24, crf=4)
    seen = video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16).mean((1, 2, 3)) / 5
    assert len(seen) == 32
    assert np.abs(seen - 1.5 * np.arange(32)).max() <= 0.75  # half a frame, and what H.264 does to a grey level
    faster = video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=30).mean((1, 2, 3)) / 5
    assert len(faster) == 60 and np.abs(faster - 0.8 * np.arange(60)).max() <= 0.75


@given(frames=st.integers(1, 200), rate=st.floats(5, 60), fps=st.floats(5, 60))
def test_resampled_times_are_nearest_and_cover_the_clip(frames: int, rate: float, fps: float) -> None:
    found = video.VideoFacts(frames=frames, fps=rate, width=32, height=32)
    chosen = video.select_nearest_frames(np.arange(frames) / rate, found, fps)
    wanted = np.arange(len(chosen)) / fps
    assert (np.diff(chosen) >= 0).all() and chosen.min() >= 0 and chosen.max() < frames
    if len(chosen) != frames:  # otherwise the rates may be so near that the frames are taken as they are
        best = np.abs(np.arange(frames)[None] / rate - wanted[:, None]).min(1)
        assert np.allclose(np.abs(chosen / rate - wanted), best)
        assert abs(len(chosen) / fps - frames / rate) <= 1 / fps + 1e-3 or len(chosen) == 1


@given(width=st.integers(8, 2000), height=st.integers(8, 2000), wide=st.sampled_from([32, 64, 832]), tall=st.sampled_from([32, 480]))
def test_covering_keeps_proportions_and_avoids_decords_widths(width: int, height: int, wide: int, tall: int) -> None:
    found = video.VideoFacts(frames=1, fps=16.0, width=width, height=height)
    y, x = video.covering_size(found, tall, wide)
    assert y >= tall and x >= wide and x not in video.UNREADABLE_WIDTHS
    assert abs(y - x * height / width) <= max(1, height / width)


def test_a_size_that_covers_is_cut_in_the_middle(tmp_path: Path) -> None:
    """Red left, green middle, blue right: of a picture three times as wide as high, the middle square is green."""
    picture = np.zeros((64, 192, 3), np.uint8)
    for i in range(3):
        picture[:, 64 * i : 64 * (i + 1), i] = 200
    video.write_video(tmp_path / "a.mp4", [picture] * 5, fps=16, crf=4)
    seen = video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16)[:, 4:-4, 4:-4].mean((0, 1, 2))
    assert seen[1] > 190 and seen[0] < 10 and seen[2] < 10
    tall = video.read_video(tmp_path / "a.mp4", height=32, width=96, fps=16)
    assert tall.shape == (5, 32, 96, 3) and tall[..., 8, 0].mean() > 190 and tall[..., 88, 2].mean() > 190


def test_frames_asked_for(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", pan(30), fps=16, crf=12)
    whole = video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16)
    assert (video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16, frames=9) == whole[:9]).all()
    with pytest.raises(ValueError, match="30 frames at 16 fps, fewer than the 31"):
        video.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16, frames=31)


@pytest.mark.parametrize("fps", [16, 30, 10])
def test_pieces_are_the_whole(tmp_path: Path, fps: int) -> None:
    video.write_video(tmp_path / "a.mp4", pan(90), fps=16, crf=12)
    how = {"height": 32, "width": 64, "fps": fps}
    whole = video.read_video(tmp_path / "a.mp4", **how)
    pieces = list(video.read_pieces(tmp_path / "a.mp4", **how, size=8, cut=lambda n: n - 3))
    assert {len(piece) for piece in pieces[:-1]} == {8} and 0 < len(pieces[-1]) <= 8
    assert (np.concatenate(pieces) == whole[:-3]).all()


@pytest.mark.parametrize("width", sorted(video.UNREADABLE_WIDTHS))
def test_widths_that_decord_misreads_are_refused_in_a_sentence(tmp_path: Path, width: int) -> None:
    """If decord ever reads them, this fails and the list can go."""
    video.write_video(tmp_path / "a.mp4", np.zeros((5, 32, width, 3), np.uint8), fps=16, crf=12)
    with pytest.raises(ValueError, match=f"a.mp4 is {width} pixels wide, which decord reads wrongly"):
        video.probe_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=f"video.width is {width}"):
        video.read_video(tmp_path / "a.mp4", height=32, width=width, fps=16)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("index", ["in front", "at the end"])
def test_a_file_cut_anywhere_is_unreadable(tmp_path: Path, part: float, index: str) -> None:
    path = tmp_path / "a.mp4"
    if index == "in front":
        video.write_video(path, pan(200), fps=16, crf=12)
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width = stream.height = 32
            for frame in pan(200):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"^a\.mp4 [^\n]*$"):
        video.read_squeezed(path, side=32)


@pytest.mark.parametrize("content", [b"", b"not a video\n" * 500, bytes(10_000)])
def test_other_files_are_no_videos(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    for read in (video.probe_video, lambda path: video.read_video(path, height=32, width=32, fps=16)):
        with pytest.raises(ValueError, match=r"a\.mp4 is not a video"):
            read(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 is not there"):
        video.probe_video(tmp_path / "b.mp4")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
class TestRealClips:
    def test_matroska_without_a_frame_count(self, tmp_path: Path) -> None:
        path = CLIPS / "flipping_a_pancake.mkv"
        assert video.probe_video(path) == video.VideoFacts(frames=310, fps=30.0, width=426, height=240)
        frames = video.read_video(path, height=32, width=56, fps=16)
        assert frames.shape == (165, 32, 56, 3) and frames.std() > 20
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
        with pytest.raises(ValueError, match=r"cut\.mkv is cut off: its header promises \d+ frames, \d+ are there"):
            video.read_squeezed(cut, side=32)

    def test_two_streams_and_a_broken_rate(self) -> None:
        assert video.probe_video(CLIPS / "nasa_13013.mp4").width == 480
        assert video.read_video(CLIPS / "nasa_13013.mp4", height=64, width=64, fps=16).shape == (208, 64, 64, 3)

    def test_rotation_is_applied(self) -> None:
        assert (video.probe_video(CLIPS / "rotated_0.mov").width, video.probe_video(CLIPS / "rotated_90.mov").width) == (568, 320)

    @pytest.mark.parametrize(
        ("name", "why"),
        [("av1_video.mkv", "is av1, which decord cannot decode"), ("corrupted.mp4", "is damaged"), ("README.md", "is not a video")],
    )
    def test_unreadable(self, name: str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            video.read_squeezed(CLIPS / name, side=32)

    @pytest.mark.parametrize("name", ["h264_10bits.mp4", "h265_10bits.mp4", "h265_video.mp4", "bt709_full_range.mp4", "pose.mp4"])
    def test_other_encodings(self, name: str) -> None:
        found, frames = video.read_squeezed(CLIPS / name, side=32)
        assert len(frames) == found.frames
