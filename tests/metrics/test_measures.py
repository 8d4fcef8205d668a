"""Windows, drift, seams, repetition and flow: each failure moves its own measure, and an even video has perfect ones."""

from __future__ import annotations

import numpy as np
import pytest

from cf_model.metrics import drift, flow, long, repetition, vbench, windowed

RNG = np.random.default_rng(0)


def texture(height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth noise, uint8, that tiles without a seam."""
    noise = np.fft.fft2(RNG.normal(size=(3, height, width)))
    low = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) < 0.12
    smooth = np.fft.ifft2(noise * low).real
    return ((smooth / np.abs(smooth).max() * 100) + 128).astype(np.uint8).transpose(1, 2, 0)


def scrolling(frames: int, step: int = 2) -> np.ndarray:
    picture = texture()
    return np.stack([np.roll(picture, step * k, axis=1) for k in range(frames)])


def test_81_chunks_fill_the_window_at_60_seconds_and_80_do_not() -> None:
    assert windowed.count_frames(81) == 969 and windowed.count_frames(80) == 957
    whole = windowed.select_window(969, 16, 60)
    assert whole is not None and whole.tolist() == list(range(952, 969)) and len(whole) == 17
    assert windowed.select_window(957, 16, 60) is None
    assert sorted(windowed.score_windows(np.ones(957), 16)) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("fps", [8, 12, 16, 23.976, 24, 30])
def test_a_window_is_the_frames_within_half_a_second(fps: float) -> None:
    frames = int(61 * fps)
    times = np.arange(frames) / fps
    similarities = RNG.normal(size=frames)
    for second, score in windowed.score_windows(similarities, fps).items():
        near = np.abs(times - second) <= 0.5 + 1e-9
        assert score == pytest.approx(100 * similarities[near].mean())


def test_windowed_scores_compare_with_frame_0_and_with_the_text() -> None:
    turn = np.linspace(0, np.pi / 2, 331)  # 33 s at 10 fps: from the first feature to one at a right angle
    features = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    scores = windowed.score_anchored(features, 10)
    assert list(scores) == [10, 20, 30] and scores[10] == pytest.approx(100 * np.cos(turn[100]), abs=0.1)
    assert windowed.score_prompt(features, np.array([0.0, 2.0]), 10)[20] == pytest.approx(100 * np.sin(turn[200]), abs=0.1)
    assert set(windowed.list_window_frames(331, 10)) == {0, *range(95, 106), *range(195, 206), *range(295, 306)}


def test_an_even_video_does_not_drift_and_each_drift_moves_its_own_measure() -> None:
    video, ramp = scrolling(80), np.linspace(0, 1, 80)[:, None, None, None]
    even = drift.score_drift(drift.measure_frames(video), 16)
    assert all(abs(value) < 0.02 for name, value in even.items() if name != "clipped") and even["clipped"] == 0
    brighter = drift.score_drift(drift.measure_frames(np.clip(video * (1 + ramp), 0, 255).astype(np.uint8)), 16)
    assert brighter["luma_late"] > 0.4 and brighter["luma_slope"] > 4 and brighter["clipped"] > 0.03
    grey = video.mean(axis=3, keepdims=True)
    paler = drift.score_drift(drift.measure_frames((grey + (video - grey) * (1 - ramp)).astype(np.uint8)), 16)
    assert paler["colour_late"] < -0.5 and abs(paler["luma_late"]) < 0.05
    noise = RNG.normal(size=video.shape) * 30 * ramp
    noisy = drift.score_drift(drift.measure_frames(np.clip(video + noise, 0, 255).astype(np.uint8)), 16)
    assert noisy["sharpness_late"] > 1 and abs(noisy["luma_late"]) < 0.05
    with pytest.raises(ValueError, match="it has 3 frames; give at least 4"):
        drift.measure_drift(np.ones(3), 16)


def test_the_slope_is_in_parts_of_the_beginning_a_minute() -> None:
    assert drift.measure_drift(1 + np.arange(960) / 960, 16)["slope"] == pytest.approx(1, rel=0.05)


def test_seams_are_seen_at_chunk_borders() -> None:
    assert drift.list_chunk_borders(45, 3).tolist() == [9, 21, 33]
    assert windowed.count_frames(4) == 45
    differences = np.ones(968)
    assert drift.score_seams(differences, latents=3, window=21)["seam_ratio"] == 1
    assert "seam_autocorrelation" not in drift.score_seams(differences, latents=3, window=21)  # nothing varies
    differences[drift.list_chunk_borders(969, 3) - 1] = 3
    assert drift.score_seams(differences, latents=3, window=21)["seam_ratio"] == 3
    assert drift.score_seams(RNG.permutation(differences), latents=3, window=21)["seam_ratio"] < 1.5
    assert drift.score_seams(np.ones(5), latents=3, window=21) == {}


def test_frames_that_are_measured_together_measure_what_each_does_alone() -> None:
    """96 x 128 pixels are measured two frames at a time, so the last of five is alone."""
    video = scrolling(5)
    assert drift.PIXELS_AT_ONCE // video[0, ..., 0].size == 2
    together, alone = drift.measure_frames(video), [drift.measure_frames(frame[None]) for frame in video]
    for name, values in together.items():
        assert values.shape == (5,) and values.tolist() == [one[name].item() for one in alone]
    luma = (video[0] @ np.array([0.2126, 0.7152, 0.0722])).mean()
    assert together["luma"][0] == pytest.approx(luma) and drift.measure_frames(video[:0])["luma"].shape == (0,)


def test_frames_of_32_x_32_are_their_own_thumbnails() -> None:
    small = scrolling(3)[:, :32, :32]
    assert np.array_equal(repetition.make_thumbnails(small), small)
    assert np.array_equal(repetition.make_thumbnails(small.repeat(2, axis=1).repeat(2, axis=2)), small)


def test_a_rhythm_of_the_windows_length_is_found() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=968)
    flicker = noise + 3 * (np.arange(968) % 84 == 0)
    assert abs(drift.score_seams(noise, latents=3, window=21)["seam_autocorrelation"]) < 0.15
    assert drift.score_seams(1.0 + np.tile(rng.random(84), 12)[:968], latents=3, window=21)["seam_autocorrelation"] > 0.99
    assert drift.score_seams(flicker, latents=3, window=21)["seam_autocorrelation"] > 0.05
    assert abs(drift.score_seams(flicker, latents=3, window=20)["seam_autocorrelation"]) < 0.15


def test_a_loop_repeats_and_its_period_is_found() -> None:
    once = repetition.make_thumbnails(RNG.integers(0, 255, (96, 64, 64, 3), dtype=np.uint8).repeat(2, axis=0)[:180])
    loop = np.concatenate([once[:100]] * 3)
    distance, period = repetition.measure_repetition(loop, 16) or (1.0, 0.0)
    assert distance == 0 and period == 100 / 16
    other, _ = repetition.measure_repetition(once, 16) or (0.0, 0.0)
    assert other > repetition.THRESHOLD and repetition.score_no_repeat([0, other]) == 50
    assert repetition.measure_repetition(once[:159], 16) is None  # half of it ends before 5 s
    assert repetition.calibrate_threshold([float(k) for k in range(1, 102)]) == 6


@pytest.mark.parametrize("shift", [(0, 5), (3, -4), (-6, 2)])
def test_block_matching_finds_a_shift(shift: tuple[int, int]) -> None:
    picture = texture(160, 192)
    video = np.stack([np.roll(picture, (shift[0] * k, shift[1] * k), axis=(0, 1)) for k in range(4)])
    fields = flow.estimate_flow(video, flow.BlockMatchingFlow())
    assert len(fields) == 3 and fields[0].shape == (2, 10, 12)
    for field in fields:
        inner = field[:, 1:-1, 1:-1].reshape(2, -1)
        assert np.median(inner[0]) == shift[1] and np.median(inner[1]) == shift[0]
    assert flow.measure_magnitude(fields[0], 160) == pytest.approx(np.hypot(*shift) / 160, rel=0.2)


def test_flow_of_small_frames() -> None:
    assert flow.estimate_flow(scrolling(3, 1)[:, :64, :64], flow.BlockMatchingFlow())[0].shape == (2, 8, 8)
    with pytest.raises(ValueError, match="frames are 24 x 64 pixels; block matching needs at least 32"):
        flow.BlockMatchingFlow().push(np.zeros((64, 24, 3), np.uint8))


def test_a_jump_is_a_spike_and_steady_motion_is_none() -> None:
    steady = 0.02 + 0.001 * RNG.random(100)
    assert flow.score_spikes(steady)["flow_spikes"] == 0
    jumping = steady.copy()
    jumping[[20, 60]] = 0.3
    scores = flow.score_spikes(jumping)
    assert scores["flow_spikes"] == 2 and scores["flow_variance_largest"] > 100 * flow.score_spikes(steady)["flow_variance_largest"]
    with pytest.raises(ValueError, match="needs 9 frames, and there are 8"):
        flow.score_spikes(np.ones(7))


def test_a_fixed_total_of_long_videos_counts_videos_and_upstreams_counts_clips() -> None:
    clips, fast = [[1.0] * 9, [0.0]], [0.9, None]
    table = {0.0: 0.0, 1.0: 1.0}
    assert long.average_upstream(clips, fast, long.IN_CLIP_ONLY, table) == 0.9
    assert long.average_fixed(clips, fast, long.IN_CLIP_ONLY, long.MOMENTS["subject_consistency"]) == 0.5
    moments = long.MOMENTS["subject_consistency"]
    assert long.map_by_moments(moments.clip2clip_mean, moments) == moments.inclip_mean


@pytest.mark.parametrize("frames", [1, 0])
def test_consistency_of_a_single_frame_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match=f"there are {frames}; give a video of at least 2"):
        vbench.score_consistency(np.ones((frames, 4)))


def test_dynamic_degree_by_block_matching_tells_motion_from_stillness() -> None:
    still, moving = scrolling(9, 0), scrolling(9, 5)
    for video, moves in ((still, False), (moving, True)):
        scores = [vbench.score_flow(field) for field in flow.estimate_flow(video, flow.BlockMatchingFlow())]
        assert vbench.decide_motion(scores, height=96, width=128, sampled=9) == moves
