"""Which frames belong to which times, whatever the container, the codec, the rate and the file's first time are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cf_model.data import video, video_reader, worlds
from tests.data.files import KINDS, RATES, Film, decode_in_order, draw_film, write_film

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
FPS = 16


def pan(frames: int, *, fps: int = 16, size: int = 32, seed: int = 0) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(seed), frames, height=size, width=size, fps=fps)


def read(path: Path, *, fps: float = FPS, **more: int) -> np.ndarray:
    return video_reader.read_video(path, height=32, width=32, fps=fps, **more)


def find_nearest(times: list[Fraction], count: int, fps: int) -> list[int]:
    """The frames nearest to 0, 1/fps, … after the first one; of two as near the earlier."""
    return [min(range(len(times)), key=lambda i: (abs(times[i] - times[0] - Fraction(k, fps)), i)) for k in range(count)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(film=draw_film())
def test_frames_at_16_fps_are_those_that_sequential_decoding_gives(tmp_path: Path, film: Film) -> None:
    container, codec, rate, times = film
    count = len(times)
    path = tmp_path / f"film.{KINDS[container][0]}"
    write_film(path, *film)
    shown, levels = decode_in_order(path)
    assert count - 1 <= len(shown) <= count  # mpeg4 drops a frame where the rate varies
    if container == "mpeg" or (container, codec) == ("avi", "libx264"):  # whose times are wrong in PyAV too; its order is right
        shown = [Fraction(i) / rate for i in range(len(shown))]
    facts = video_reader.probe_video(path)
    seen = read(path)
    assert facts.frames == len(shown) and len(seen) == facts.count_frames(FPS)
    wanted = [levels[i] for i in find_nearest(shown, len(seen), FPS)]
    assert np.abs(seen.mean((1, 2, 3)) - wanted).max() < 3, "neighbouring frames differ by 9 levels at least"
    length = shown[-1] - shown[0]
    assert length <= facts.length <= length + max(Fraction(9) / rate, Fraction(1, 8)) + Fraction(1, 500)


@given(frames=st.integers(1, 400), rate=st.sampled_from(RATES), fps=st.sampled_from([8, 16, 24]))
def test_lengths_are_whole_frames(frames: int, rate: Fraction, fps: int) -> None:
    count = video_reader.count_ticks(frames / rate, Fraction(fps))
    assert count == 1 or -Fraction(1, 10) <= Fraction(frames) * fps / rate - count + Fraction(1, 10) < 1 + Fraction(1, 10)


def test_another_rate_takes_the_nearest_frames_in_time(tmp_path: Path) -> None:
    """Frame i is as bright as i, so a frame tells its own time."""
    levels = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None, None, None] * 5, (48, 32, 32, 3))
    video.write_video(tmp_path / "a.mp4", levels, fps=24, crf=4)
    seen = read(tmp_path / "a.mp4").mean((1, 2, 3)) / 5
    assert len(seen) == 32
    assert np.abs(seen - 1.5 * np.arange(32)).max() <= 0.75  # half a frame, and what H.264 does to a grey level
    faster = read(tmp_path / "a.mp4", fps=30).mean((1, 2, 3)) / 5
    assert len(faster) == 60 and np.abs(faster - 0.8 * np.arange(60)).max() <= 0.75


def test_same_size_and_rate_is_what_an_independent_decoder_sees(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", pan(40, size=64), fps=16, crf=20)
    with av.open(str(tmp_path / "a.mp4")) as container:
        theirs = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert (video_reader.read_video(tmp_path / "a.mp4", height=64, width=64, fps=16) == theirs).all()


@pytest.mark.parametrize("width", [8, 24, 48, 72])
def test_every_width_can_be_read(tmp_path: Path, width: int) -> None:
    """decord 0.6, which this project once read with, returns the wrong shape for these."""
    video.write_video(tmp_path / "a.mp4", np.full((5, 32, width, 3), 90, np.uint8), fps=16, crf=12)
    seen = video_reader.read_video(tmp_path / "a.mp4", height=32, width=width, fps=16)
    assert seen.shape == (5, 32, width, 3) and abs(seen.astype(int) - 90).max() < 4


def draw_circle(height: int, width: int) -> np.ndarray:
    """A white ellipse that is a circle once the picture is `width / height` times as wide as high."""
    y, x = np.mgrid[:height, :width]
    inside = ((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2 < 0.25**2
    return np.repeat(np.where(inside, 220, 20)[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize(("size", "pixel"), [((480, 720), Fraction(32, 27)), ((64, 64), Fraction(2)), ((64, 64), Fraction(1, 2))])
def test_pixels_become_square(tmp_path: Path, size: tuple[int, int], pixel: Fraction) -> None:
    write_film(tmp_path / "a.mp4", "mp4", "libx264", Fraction(16), range(4), size=size, pixel=pixel, pictures=[draw_circle(*size)] * 4)
    facts = video_reader.probe_video(tmp_path / "a.mp4")
    assert facts.width / facts.height == pytest.approx(size[1] / size[0] * float(pixel), rel=0.01)
    seen = video_reader.read_video(tmp_path / "a.mp4", height=facts.height, width=facts.width, fps=16)[1, ..., 1] > 120
    tall, wide = (int(seen.any(axis).sum()) for axis in (1, 0))
    assert wide / facts.width == pytest.approx(tall / facts.height, abs=0.05)


def test_a_very_wide_picture_is_cropped_before_it_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.zeros((64, 4096, 3), np.uint8)
    picture[:, 2000:2096] = (20, 180, 20)
    write_film(tmp_path / "a.mp4", "mp4", "libx264", Fraction(16), range(2), size=(64, 4096), pictures=[picture] * 2)
    largest = []
    convert = video_reader.PictureConverter.__call__

    def watch(self: object, frame: object, height: int, width: int) -> np.ndarray:
        largest.append(height * width)
        return convert(self, frame, height, width)  # type: ignore[arg-type]

    monkeypatch.setattr(video_reader.PictureConverter, "__call__", watch)
    seen = video_reader.read_video(tmp_path / "a.mp4", height=480, width=832, fps=16)
    assert seen.shape == (2, 480, 832, 3) and max(largest) <= 480 * 832
    assert seen[0, 200:280, 360:460, 1].mean() > 150


@pytest.mark.parametrize(("lines", "shown"), [(64, (220, 40, 40)), (720, (220, 40, 40))])
def test_colours_survive_writing_and_high_definition_is_tagged(tmp_path: Path, lines: int, shown: tuple[int, ...]) -> None:
    picture = np.full((lines, 128, 3), shown, np.uint8)
    video.write_video(tmp_path / "a.mp4", [picture] * 3, fps=16, crf=4)
    seen = video_reader.read_video(tmp_path / "a.mp4", height=lines, width=128, fps=16).mean((0, 1, 2))
    assert np.abs(seen - shown).max() < 4
    with av.open(str(tmp_path / "a.mp4")) as file:
        frame = next(file.decode(video=0))
        assert (frame.colorspace == 1) == (lines >= 720)
        assert not lines >= 720 or (frame.color_primaries, frame.color_trc) == (1, 1)


def test_a_size_that_covers_is_cut_in_the_middle(tmp_path: Path) -> None:
    """Red left, green middle, blue right: of a picture three times as wide as high, the middle square is green."""
    picture = np.zeros((64, 192, 3), np.uint8)
    for i in range(3):
        picture[:, 64 * i : 64 * (i + 1), i] = 200
    video.write_video(tmp_path / "a.mp4", [picture] * 5, fps=16, crf=4)
    seen = read(tmp_path / "a.mp4")[:, 4:-4, 4:-4].mean((0, 1, 2))
    assert seen[1] > 190 and seen[0] < 10 and seen[2] < 10
    tall = video_reader.read_video(tmp_path / "a.mp4", height=32, width=96, fps=16)
    assert tall.shape == (5, 32, 96, 3) and tall[..., 8, 0].mean() > 190 and tall[..., 88, 2].mean() > 190


@given(width=st.integers(8, 2000), height=st.integers(8, 2000), wide=st.sampled_from([32, 64, 832]), tall=st.sampled_from([32, 480]))
def test_covering_keeps_proportions(width: int, height: int, wide: int, tall: int) -> None:
    y, x = video_reader.covering_size(height, width, tall, wide)
    assert y >= tall and x >= wide
    assert abs(y - x * height / width) <= max(1, height / width)


def test_windows_and_pieces_are_parts_of_the_whole(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", pan(90), fps=16, crf=12)
    for fps in (16, 30, 10):
        whole = read(tmp_path / "a.mp4", fps=fps)
        how = {"height": 32, "width": 32, "fps": fps}
        pieces = list(video_reader.read_pieces(tmp_path / "a.mp4", **how, size=8))
        assert {len(piece) for piece in pieces[:-1]} == {8} and 0 < len(pieces[-1]) <= 8
        assert (np.concatenate(pieces) == whole).all()
        part = np.concatenate(list(video_reader.read_pieces(tmp_path / "a.mp4", **how, size=8, start=11, frames=20)))
        assert (part == whole[11:31]).all()
    with pytest.raises(ValueError, match=r"a\.mp4 has 90 frames at 16 fps, fewer than the 91"):
        read(tmp_path / "a.mp4", frames=91)


def test_a_whole_film_that_begins_late_or_changes_its_rate_is_not_cut_off(tmp_path: Path) -> None:
    write_film(tmp_path / "late.mkv", "matroska", "libx264", Fraction(30), range(30, 360))
    assert video_reader.probe_video(tmp_path / "late.mkv").seconds == pytest.approx(11.0, abs=0.01)
    screen = [0, 3, 4, 5, 90, 91, 300, 330, 331, 600]  # of a screen: 10 frames in 20 s
    for name, container, codec in (("a.mkv", "matroska", "libx264"), ("b.webm", "webm", "libvpx-vp9")):
        write_film(tmp_path / name, container, codec, Fraction(30), screen)
        facts = video_reader.probe_video(tmp_path / name)
        assert facts.frames == 10 and 20 <= facts.seconds < 22.3
        assert len(read(tmp_path / name)) == facts.count_frames(16) >= 320


def test_the_largest_stream_is_read_and_named(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mkv"), "w") as file:
        streams = [file.add_stream("libx264", rate=16) for _ in range(2)]
        for stream, side in zip(streams, (32, 64), strict=True):
            stream.width = stream.height = side
        for stream, side in zip(streams, (32, 64), strict=True):
            for _ in range(20):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 2 * side, np.uint8), format="rgb24")))
            file.mux(stream.encode(None))
    facts = video_reader.probe_video(tmp_path / "two.mkv")
    assert (facts.width, facts.stream) == (64, "stream 1, 64x64, the largest of 2")
    assert read(tmp_path / "two.mkv").mean() > 120


def test_a_film_that_changes_its_size_or_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    for name, size in (("a.ts", (64, 64)), ("b.ts", (32, 96)), ("c.ts", (64, 64))):
        write_film(tmp_path / name, "mpegts", "mpeg2video", Fraction(25), range(50), size=size)
    (tmp_path / "sizes.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    (tmp_path / "back.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "c.ts").read_bytes())
    for name in ("sizes.ts", "back.ts"):
        with pytest.raises(ValueError, match=rf"^{name} (changes its size|goes back in time|is damaged)[^\n]*; [^\n]+$"):
            video_reader.probe_video(tmp_path / name)


def test_lists_of_other_files_are_not_followed(tmp_path: Path) -> None:
    video.write_video(tmp_path / "secret.mp4", pan(20), fps=16, crf=12)
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n")
    (tmp_path / "b.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{tmp_path / 'secret.mp4'}\n#EXT-X-ENDLIST\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(ValueError, match=f"{name} is (not a video|concat|hls)"):
            video_reader.probe_video(tmp_path / name)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("index", ["in front", "at the end"])
def test_a_file_cut_anywhere_is_unreadable(tmp_path: Path, part: float, index: str) -> None:
    path = tmp_path / "a.mp4"
    if index == "in front":
        video.write_video(path, pan(200), fps=16, crf=12)
    else:
        write_film(path, "mp4", "libx264", Fraction(16), range(200))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"^a\.mp4 [^\n]*$"):
        video_reader.probe_video(path)


@pytest.mark.parametrize("lost", [1, 200, 2000])
@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("webm", "libvpx-vp9")])
def test_a_matroska_file_that_lost_its_last_bytes_is_cut_off(tmp_path: Path, container: str, codec: str, lost: int) -> None:
    path = tmp_path / "a.mkv"
    write_film(path, container, codec, Fraction(25), range(300))
    assert video_reader.read_segment_end(path) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"a\.mkv is (cut off: its header promises \d+ bytes, \d+ are there|damaged)"):
        video_reader.probe_video(path)


@pytest.mark.parametrize("content", [b"", b"not a video\n" * 500, bytes(10_000)])
def test_other_files_are_no_videos(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    for look in (video_reader.probe_video, read):
        with pytest.raises(ValueError, match=r"a\.mp4 is not a video"):
            look(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 is not there"):
        video_reader.probe_video(tmp_path / "b.mp4")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
class TestRealClips:
    def test_matroska_without_a_frame_count(self, tmp_path: Path) -> None:
        path = CLIPS / "flipping_a_pancake.mkv"
        facts = video_reader.probe_video(path)
        assert (facts.frames, facts.fps, facts.width, facts.height) == (310, 30.0, 426, 240)
        frames = video_reader.read_video(path, height=32, width=56, fps=16)
        assert frames.shape == (165, 32, 56, 3) and frames.std() > 20
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
        with pytest.raises(ValueError, match=r"cut\.mkv (is cut off: its header promises \d+ bytes, \d+ are there|is damaged)"):
            video_reader.probe_video(cut)

    def test_two_streams(self) -> None:
        facts = video_reader.probe_video(CLIPS / "nasa_13013.mp4")
        assert (facts.width, facts.stream, facts.frames) == (480, "stream 3, 480x270, the largest of 2", 390)
        assert video_reader.read_video(CLIPS / "nasa_13013.mp4", height=64, width=64, fps=16).shape == (208, 64, 64, 3)

    def test_rotated_files_are_upright(self) -> None:
        """Each of the four holds the same scene, filmed with the camera turned; upright they have landscape or portrait sides."""
        sizes = {}
        for turn in (0, 90, 180, 270):
            facts = video_reader.probe_video(CLIPS / f"rotated_{turn}.mov")
            sizes[turn] = (facts.width, facts.height)
        assert sizes == {0: (568, 320), 180: (568, 320), 90: (320, 568), 270: (320, 568)}
        coded = decode_first(CLIPS / "rotated_180.mov")
        seen = video_reader.read_video(CLIPS / "rotated_180.mov", height=320, width=568, fps=30)[0]
        assert np.abs(seen.astype(int) - coded[::-1, ::-1]).mean() < 1

    def test_unordered_frames_come_in_the_order_of_presentation(self) -> None:
        times, _ = decode_in_order(CLIPS / "unordered.mov")
        assert times == sorted(times) and len(times) == video_reader.probe_video(CLIPS / "unordered.mov").frames == 4

    def test_av1_is_read(self) -> None:
        assert video_reader.probe_video(CLIPS / "av1_video.mkv").frames == 125

    @pytest.mark.parametrize(("name", "why"), [("corrupted.mp4", "is damaged"), ("README.md", "is not a video")])
    def test_unreadable(self, name: str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            video_reader.probe_video(CLIPS / name)

    @pytest.mark.parametrize("name", ["h264_10bits.mp4", "h265_10bits.mp4", "h265_video.mp4", "bt709_full_range.mp4", "pose.mp4"])
    def test_other_encodings(self, name: str) -> None:
        facts = video_reader.probe_video(CLIPS / name)
        assert facts.count_frames(facts.fps) == facts.frames


def decode_first(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")
