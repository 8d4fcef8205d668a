"""Interlaced and HDR films: made whole, or refused in a sentence."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorTrc

from cf_model.data.video_reader import probe_video, read_video

SIDE, FRAMES = 96, 30


def draw_bar(half: int) -> np.ndarray:
    """A white bar that moves by 6 pixels from a field to the next, so that two fields of a frame differ."""
    picture = np.full((SIDE, SIDE), 30, np.uint8)
    at = half * 6 % (SIDE - 20)
    picture[:, at : at + 20] = 220
    return picture


def write_film(path: Path, *, interlaced: bool, transfer: ColorTrc | None = None) -> None:
    with av.open(str(path), "w") as file:
        options = {"x264-params": "bff=1"} if interlaced else {}
        stream = file.add_stream("libx264", rate=Fraction(16), options={"crf": "8", **options})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        if transfer:
            stream.codec_context.color_trc = transfer
        for number in range(FRAMES):
            luma = draw_bar(2 * number)
            if interlaced:
                luma[::2] = draw_bar(2 * number + 1)[::2]  # of the field that is shown later
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, np.full((SIDE // 2, SIDE), 128, np.uint8)]), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 16)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def measure_combs(frames: np.ndarray) -> float:
    """How much neighbouring lines differ more than lines of the same field do."""
    lines = frames[..., 0].astype(int)
    return float(np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean())


def test_interlaced_frames_are_made_whole_in_their_order_and_number(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mkv", interlaced=True)
    with av.open(str(tmp_path / "a.mkv")) as file:
        coded = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    seen = read_video(tmp_path / "a.mkv", height=SIDE, width=SIDE, fps=16)
    assert len(seen) == len(coded) == FRAMES
    assert measure_combs(coded) > 5 * measure_combs(seen)
    assert np.abs(seen[:, 1::2].astype(int) - coded[:, 1::2]).mean() < 4, "the first field stays, frame by frame"
    facts = probe_video(tmp_path / "a.mkv")
    assert (facts.frames, facts.stream) == (FRAMES, "interlaced: FFmpeg's bwdif made its frames whole")


def test_progressive_films_are_left_alone(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mkv", interlaced=False)
    assert probe_video(tmp_path / "a.mkv").stream is None


@pytest.mark.parametrize(("transfer", "name"), [(ColorTrc.SMPTE2084, "PQ"), (ColorTrc.ARIB_STD_B67, "HLG")])
def test_hdr_is_refused_in_a_sentence(tmp_path: Path, transfer: ColorTrc, name: str) -> None:
    write_film(tmp_path / "a.mp4", interlaced=False, transfer=transfer)
    with pytest.raises(ValueError, match=rf"^a\.mp4 is HDR \({name}\), whose colours would come out pale; convert it to SDR[^\n]*$"):
        probe_video(tmp_path / "a.mp4")
