from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cf_model.data import filter as rules
from cf_model.data import measures, video, worlds
from cf_model.data.duplicates import DuplicateIndex
from cf_model.data.video_reader import VideoFacts, count_ticks
from tests.data.files import write_film

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
LIMITS = SimpleNamespace(
    min_seconds=10.0, min_fps=15.0, min_side=32, min_share=0.5, max_clipped=0.4, min_motion=0.5, max_repeats=0.6, max_shake=0.05,
    max_cut=2.5, cuts="reject", trim=1.0, min_sharpness=1.0, max_border=0.2, max_text=0.1, min_words=3, min_distance=8.0,
    networks=(), captioner=None,
)  # fmt: skip
SHAPE = rules.ModelShape(height=32, width=32, fps=16, frames=81, latent=4)
CAPTION = "a camera pans slowly"


def pan(seed: int, frames: int = 177) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(seed), frames, height=32, width=32, fps=16)


def measured(frames: np.ndarray, fps: float = 16.0) -> measures.FileMeasures:
    """Frames as if they came from a file, in pieces."""
    meter = measures.FrameMeter(fps)
    for first in range(0, len(frames), 50):
        meter.add(frames[first : first + 50])
    looks = [measures.look_closer(frame.mean(-1).astype(np.uint8)) for frame in frames[:: round(fps / measures.SECOND_LOOKS)]]
    sharpness, borders, text = (np.stack([np.asarray(look[k]) for look in looks]) for k in range(3))
    facts = VideoFacts(len(frames), fps, frames.shape[2], frames.shape[1], Fraction(len(frames)) / Fraction(fps))
    traces = meter.finish()
    small = traces.pop("small")
    return measures.FileMeasures(facts, fps, signature=small, sharpness=sharpness, borders=borders, text=text, **traces)


def judge(file: measures.FileMeasures, limits: Any = LIMITS, shape: Any = SHAPE, caption: str = CAPTION) -> list[rules.Rejection | None]:
    parts = rules.split_at_cuts(file, limits)
    return [rules.find_broken_rule(file, part, rules.list_values(file, part, caption, shape), limits, shape) for part in parts]


def reason(frames: np.ndarray, fps: float = 16.0) -> str | None:
    [rejection] = judge(measured(frames, fps))
    return rejection.reason if rejection else None


@pytest.mark.parametrize("seed", range(8))
def test_a_pan_is_kept_and_two_pans_in_one_are_not(seed: int) -> None:
    one, other = pan(seed), pan(seed + 100)
    assert reason(one) is None
    assert reason(np.concatenate([one[:60], other[60:]])) == "hard_cut"
    assert reason(np.concatenate([one[:160], other[160:]])) == "hard_cut"  # a second before the end


@pytest.mark.parametrize("path", ["pan", "orbit"])
@pytest.mark.parametrize("motion", ["steady", "bursty"])
def test_no_camera_of_the_rendered_worlds_is_a_fault(path: str, motion: str) -> None:
    """A rest is no frozen clip, and the move after it no cut."""
    for seed in range(3):
        world = worlds.draw_world(seed, worlds.WorldSpec(path, motion))  # type: ignore[arg-type]
        assert reason(worlds.render_clip(world, 177, height=32, width=32, fps=16)) is None


def whip(frames: np.ndarray) -> np.ndarray:
    """Half a second of very fast panning in the middle: the strip behind the camera moves 6 pixels a frame."""
    return np.stack([np.roll(frame, -6 * int(np.clip(t - 60, 0, 16)), axis=1) for t, frame in enumerate(frames)])


def flash(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[80:82] = np.minimum(255, frames[80:82].astype(int) + 120).astype(np.uint8)
    return out


def on_twos(frames: np.ndarray) -> np.ndarray:
    return frames[np.arange(len(frames)) // 2 * 2]


def grainy(frames: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 8, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [whip, flash, on_twos, grainy])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_no_cut(change: Callable[[np.ndarray], np.ndarray], seed: int) -> None:
    assert reason(change(pan(seed))) is None


def test_two_cuts_close_together_are_not_a_flash() -> None:
    parts = [pan(1)[:80], pan(2)[:6], pan(3)[:91]]
    assert reason(np.concatenate(parts)) == "hard_cut"


def test_a_still_picture_with_noise_is_frozen_and_a_jerk_does_not_save_it() -> None:
    still = pan(1)[:1].repeat(177, axis=0)
    assert reason(still) == "frozen"
    slight = np.clip(still + np.random.default_rng(0).normal(0, 0.3, still.shape), 0, 255)
    assert reason(np.rint(slight).astype(np.uint8)) == "frozen"
    assert reason(np.concatenate([still[:130], pan(1)[1:48]])) == "frozen"


def test_thresholds_are_what_the_rules_say() -> None:
    file = measured(pan(0))
    part = rules.Part(0, 177)
    values = rules.list_values(file, part, CAPTION, SHAPE)
    assert rules.find_broken_rule(file, part, values, LIMITS, SHAPE) is None and values.keys() == set(rules.REASONS) - {
        "unreadable",
        "duplicate",
    }
    for name, value, rule in (
        ("too_short", 10.0, "seconds > 10.0, 161 frames at 16 fps; it has 177"),
        ("wrong_fps", 12.0, "fps >= 15.0"),
        ("too_small", 31, "pixels of the shorter side >= 32; it is 32x32, the model's 32x32"),
        ("cropped", 0.4, "share of the picture that the model's shape keeps >= 0.5; it is 32x32, the model's 32x32"),
        ("clipped", 0.5, "clipped <= 0.4"),
        ("frozen", 0.4, "motion >= 0.5"),
        ("jerky", 0.7, "share of repeated frames <= 0.6"),
        ("shaking", 0.06, "shake <= 0.05"),
        ("hard_cut", 2.6, "cut <= 2.5 (at  s)"),
        ("blurred", 0.9, "sharpness >= 1.0"),
        ("border", 0.3, "share of black borders <= 0.2"),
        ("text", 0.2, "share of text <= 0.1"),
        ("caption", 2, "words of the caption >= 3"),
    ):
        rejection = rules.find_broken_rule(file, part, values | {name: value}, LIMITS, SHAPE)
        assert rejection == rules.Rejection(name, value, rule)


@given(
    rate=st.sampled_from([Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60)]),
    frames=st.integers(200, 1000),
    needed=st.sampled_from([81, 161, 165, 169]),
)
def test_a_clip_that_passes_has_the_frames_that_training_needs(rate: Fraction, frames: int, needed: int) -> None:
    """At the boundary, whatever the file's rate: lengths count in whole latents at the model's rate."""
    count = count_ticks(frames / rate, Fraction(16))
    file = measured(pan(0, 20))
    shape = rules.ModelShape(height=32, width=32, fps=16, frames=needed, latent=4)
    part = rules.Part(0, count)
    values = {"too_short": count / 16}
    rejection = rules.find_broken_rule(file, part, values, LIMITS, shape)
    assert (rejection is None) == (count >= 161 and shape.count_usable(count) >= needed)
    assert rejection is None or (
        f"{count}" in rejection.rule and "frames" in rejection.rule and ("seconds" in rejection.rule or " s)" in rejection.rule)
    )


def test_a_cut_near_an_end_is_trimmed_and_others_split_when_asked() -> None:
    black = np.zeros((1, 32, 32, 3), np.uint8)
    file = measured(np.concatenate([black, pan(1)]))
    assert rules.split_at_cuts(file, LIMITS) == [rules.Part(1, 178)] and judge(file) == [None]
    two = measured(np.concatenate([pan(1), pan(2), pan(3)[:9]]))
    assert rules.split_at_cuts(two, LIMITS) == [rules.Part(0, 354)]
    [rejection] = judge(two)
    assert rejection and rejection.reason == "hard_cut" and rejection.rule == "cut <= 2.5 (at 11.06 s)"
    split = SimpleNamespace(**(vars(LIMITS) | {"cuts": "split"}))
    assert rules.split_at_cuts(two, split) == [rules.Part(0, 177), rules.Part(177, 354)] and judge(two, split) == [None, None]


def test_what_is_jerky_shaking_blurred_lettered_or_boxed() -> None:
    good = pan(1)
    assert reason(good[np.arange(177) // 4 * 4]) == "jerky"
    rng = np.random.default_rng(0)
    shaken = np.stack([np.roll(frame, tuple(rng.integers(-4, 5, 2)), (0, 1)) for frame in good])
    assert judge(measured(shaken))[0].reason == "shaking"  # type: ignore[union-attr]
    boxed = good.copy()
    boxed[:, :5] = boxed[:, -5:] = 0
    assert judge(measured(boxed))[0].reason == "border"  # type: ignore[union-attr]
    flat = np.full((64, 160), 90, np.uint8)
    letters = flat.copy()
    letters[48:60, 20:140:4] = letters[48:60, 21:140:4] = 240
    assert measures.look_closer(flat)[0] == 0 and not measures.look_closer(flat)[2].any()
    assert measures.look_closer(letters)[2].mean() > 0.05
    sharp, soft = (measures.look_closer(picture)[0] for picture in (letters, np.asarray(letters // 2 + 60)))
    assert sharp > 1.5 * soft > 0


@pytest.mark.parametrize(
    ("caption", "words"),
    [("IMG_2034", 0), ("VID 20240101 WA0003", 1), ("a new clip of a cat", 3), ("https://x.com/a3f", 0),
     ("a red disc in the fog", 5), ("", 0), ("3f2a99b1c0de", 0),
     ("一只猫坐在墙前", 7), ("кошка спит дома", 3), ("untitled-2", 0)],
)  # fmt: skip
def test_words_that_say_something(caption: str, words: int) -> None:
    assert rules.count_words(caption) == words


def find_twin(frames: np.ndarray, accepted: DuplicateIndex) -> tuple[str | None, str | None]:
    file = measured(frames)
    likeness, rejection = rules.find_duplicate(file.sign_part(0, file.frames), accepted, LIMITS)
    return likeness and likeness.clip, rejection and rejection.rule


def test_a_copy_a_part_and_a_mirror_image_are_recognised_and_a_stranger_is_not() -> None:
    accepted = DuplicateIndex()
    for seed in range(30):
        file = measured(pan(seed, 320))
        accepted.find_closest(signature := file.sign_part(0, file.frames))
        accepted.add(f"clip-{seed}", signature)
    whole = pan(4, 320)
    brighter = np.clip(whole.astype(int) + 5, 0, 255).astype(np.uint8)
    for change in (grainy(whole), brighter, whole[70:270], whole[5:171], np.concatenate([pan(90, 100), whole[:180]])):
        assert find_twin(change, accepted) == ("clip-4", "distance >= 8.0 (from clip-4)")
    mirrored = find_twin(whole[60:260, :, ::-1], accepted)
    assert mirrored == ("clip-4", "distance >= 8.0 (a mirror image of clip-4)")
    strangers = [find_twin(pan(seed, 320), accepted)[1] for seed in range(100, 130)]
    assert strangers == [None] * 30


def test_black_and_white_are_clipped_and_colours_are_not() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, :, :8] = 255
    frames[:, :, 8:16] = (255, 0, 0)
    assert video.measure_clipped_share(frames) == 0.75
    assert video.measure_clipped_share(np.full((4, 32, 32, 3), (255, 254, 249), np.uint8)) == 0
    assert video.measure_clipped_share(np.full((4, 32, 32, 3), (251, 252, 255), np.uint8)) == 1


def test_block_means() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.allclose(measures.average_blocks(frames)[1, 2, 5], frames[1, 8:12, 20:24].mean((0, 1)))


def test_one_and_two_frames_are_measured_without_error() -> None:
    for count in (1, 2, 5):
        assert reason(pan(0, count)) == "too_short"


def test_measures_survive_their_file() -> None:
    file = measured(pan(3))
    back = measures.load_measures(measures.dump_measures(file))
    assert back.facts == file.facts and back.fps == file.fps
    assert all((getattr(back, name) == getattr(file, name)).all() or name == "motion" for name in measures.TRACES)
    assert np.array_equal(back.motion, file.motion, equal_nan=True)


def test_a_file_is_measured_as_its_frames_are(tmp_path: Path) -> None:
    """In pieces or at once, whatever the file's rate: the pictures are those that encode will read."""
    pictures = [np.kron(frame, np.ones((2, 2, 1), np.uint8)) for frame in pan(2, 130)]
    write_film(tmp_path / "a.mkv", "matroska", "libx264", Fraction(16), range(130), pictures=pictures)
    file = measures.measure_file(tmp_path / "a.mkv", fps=16)
    direct = measured(pan(2, 130)).measure_part(0, 130)
    found = file.measure_part(0, 130)
    assert file.frames == 130 and file.signature.shape == (33, 8, 8, 3)
    for name in ("motion", "cut", "shake", "clipped"):
        assert found[name] == pytest.approx(direct[name], rel=0.25, abs=0.05), name


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
class TestRealClips:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("flipping_a_pancake.mkv", None),  # handheld, an arm before the lens
            ("nasa_13013.mp4", "hard_cut"),
            ("pose.mp4", "too_short"),
            ("mixkit-a-boat-sailing-in-the-bay-1941.mp4", "too_short"),
            ("rotated_90.mov", "too_short"),
        ],
    )
    def test_reasons(self, name: str, expected: str | None) -> None:
        [rejection] = judge(measures.measure_file(CLIPS / name, fps=16))
        assert (rejection.reason if rejection else None) == expected

    def test_calm_and_handheld_scenes_have_no_cut_and_no_other_fault(self) -> None:
        names = ("mixkit-a-boat-sailing-in-the-bay-1941.mp4", "mixkit-a-couple-at-the-beach-at-sunset-1040.mp4", "flipping_a_pancake.mkv")
        brief = SimpleNamespace(**(vars(LIMITS) | {"min_seconds": 4.0}))
        for name in names:
            file = measures.measure_file(CLIPS / name, fps=16)
            assert judge(file, brief) == [None] and file.cuts.max() < 2.0
