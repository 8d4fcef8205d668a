from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cf_model.data import filter as rules
from cf_model.data import video, worlds

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
LIMITS = SimpleNamespace(min_seconds=10.0, min_fps=15.0, max_clipped=0.4, min_motion=0.5, max_cut=2.5, min_distance=8.0)


def pan(seed: int, frames: int = 177) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(seed), frames, height=32, width=32, fps=16)


def measured(frames: np.ndarray, fps: float = 16.0) -> rules.ClipMeasures:
    small = rules.average_blocks(frames)
    return rules.ClipMeasures(
        frames=len(frames),
        fps=fps,
        width=32,
        height=32,
        clipped=video.measure_clipped_share(frames),
        motion=rules.motion_per_second(frames, fps),
        cut=rules.strongest_cut(small, fps),
        signature=rules.draw_signature(small),
    )


def reason(frames: np.ndarray, fps: float = 16.0) -> str | None:
    rejection = rules.find_broken_rule(measured(frames, fps), {}, LIMITS)
    return rejection.reason if rejection else None


@pytest.mark.parametrize("seed", range(8))
def test_a_pan_is_kept_and_two_pans_in_one_are_not(seed: int) -> None:
    one, other = pan(seed), pan(seed + 100)
    assert reason(one) is None
    assert reason(np.concatenate([one[:60], other[60:]])) == "hard_cut"
    assert reason(np.concatenate([one[:160], other[160:]])) == "hard_cut"  # a second before the end


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
    clip = measured(pan(0))
    for changed, expected in (
        ({"frames": 160}, ("too_short", 10.0, "seconds > 10.0")),
        ({"fps": 12.0}, ("wrong_fps", 12.0, "fps >= 15.0")),
        ({"clipped": 0.5}, ("clipped", 0.5, "clipped <= 0.4")),
        ({"motion": 0.4}, ("frozen", 0.4, "motion >= 0.5")),
        ({"cut": 2.6}, ("hard_cut", 2.6, "cut <= 2.5")),
    ):
        rejection = rules.find_broken_rule(rules.ClipMeasures(**(vars(clip) | changed)), {}, LIMITS)  # type: ignore[arg-type]
        assert rejection == rules.Rejection(*expected)  # type: ignore[arg-type]
    assert rules.find_broken_rule(rules.ClipMeasures(**(vars(clip) | {"frames": 161})), {}, LIMITS) is None


def test_a_copy_is_recognised_by_its_twin_and_a_stranger_is_not() -> None:
    kept = {f"clip-{seed}": measured(pan(seed)).signature for seed in range(6)}
    for change in (grainy, lambda frames: frames[::2], lambda frames: np.clip(frames.astype(int) + 5, 0, 255).astype(np.uint8)):
        rejection = rules.find_broken_rule(measured(change(pan(4))), kept, SimpleNamespace(**(vars(LIMITS) | {"min_seconds": 1.0})))
        assert rejection is not None and rejection.reason == "duplicate" and rejection.rule == "distance >= 8.0 (from clip-4)"
    assert rules.find_broken_rule(measured(pan(77)), kept, LIMITS) is None


def test_black_and_white_are_clipped_and_colours_are_not() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, :, :8] = 255
    frames[:, :, 8:16] = (255, 0, 0)
    assert video.measure_clipped_share(frames) == 0.75
    assert video.measure_clipped_share(np.full((4, 32, 32, 3), (255, 254, 249), np.uint8)) == 0
    assert video.measure_clipped_share(np.full((4, 32, 32, 3), (251, 252, 255), np.uint8)) == 1


def test_block_means() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.allclose(rules.average_blocks(frames)[1, 2, 5], frames[1, 8:12, 20:24].mean((0, 1)))


def test_one_and_two_frames_are_measured_without_error() -> None:
    for count in (1, 2, 5):
        assert reason(pan(0, count)) == "too_short"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
class TestRealClips:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("flipping_a_pancake.mkv", None),  # handheld, an arm before the lens
            ("nasa_13013.mp4", "hard_cut"),  # has two
            ("pose.mp4", "too_short"),
            ("mixkit-a-boat-sailing-in-the-bay-1941.mp4", "too_short"),
            ("rotated_90.mov", "too_short"),
        ],
    )
    def test_reasons(self, name: str, expected: str | None) -> None:
        rejection = rules.find_broken_rule(rules.measure_clip(CLIPS / name), {}, LIMITS)
        assert (rejection.reason if rejection else None) == expected

    def test_calm_and_handheld_scenes_have_no_cut_and_a_splice_has(self) -> None:
        names = ("mixkit-a-boat-sailing-in-the-bay-1941.mp4", "mixkit-a-couple-at-the-beach-at-sunset-1040.mp4", "flipping_a_pancake.mkv")
        boat, couple, pancake = (video.read_squeezed(CLIPS / name, side=32)[1] for name in names)
        for frames in (boat, couple, pancake):
            assert rules.strongest_cut(rules.average_blocks(frames), 16) < 2.0 and rules.motion_per_second(frames, 16) > 1.0
        for one, other in ((boat, couple), (couple, pancake), (pancake, boat)):
            assert rules.strongest_cut(rules.average_blocks(np.concatenate([one[:40], other[:40]])), 16) > 4.0
