from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cf_model.data import video, video_reader, worlds


def pan(frames: int, *, fps: int = 16, size: int = 32, seed: int = 0) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(seed), frames, height=size, width=size, fps=fps)


def test_written_frames_come_back_in_order_and_number(tmp_path: Path) -> None:
    frames = pan(97, fps=4)
    assert video.write_video(tmp_path / "a.mp4", iter(frames), fps=16, crf=12) == 97
    back = video_reader.read_video(tmp_path / "a.mp4", height=32, width=32, fps=16)
    assert back.shape == frames.shape and back.dtype == np.uint8
    away = np.abs(back[:, None].astype(np.int16) - frames[None]).mean((2, 3, 4))
    assert (away.argmin(1) == np.arange(97)).all() and away.diagonal().max() < 8  # 4:2:0 costs colour at 32 pixels
    assert video_reader.probe_video(tmp_path / "a.mp4") == video_reader.VideoFacts(97, 16.0, 32, 32, Fraction(97, 16))


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
