"""Each simulated failure moves the metric that is there for it, and leaves others alone; a perfect video scores perfect.

Means over four worlds. The bounds are stated with much room: a perfect video is far on one side, the failure far on the other.
"""

from __future__ import annotations

import numpy as np
import pytest

from cf_model.data import worlds
from cf_model.evaluate import course, scores
from cf_model.evaluate.stutter import measure_stutter
from tests.evaluate.failures import FAILURES, FPS, FRAMES, PREFIX

WORLDS = [worlds.draw_world(seed) for seed in range(4)]
RULES = {"fps": FPS, "gap": 5.0, "absence": 2.0, "sink": 3, "chunk": 3}
PERFECT = {  # metric -> least and most
    "identity_4s": (1, 1), "identity_8s": (1, 1), "hills_readable": (1, 1), "revisit_skill": (0.85, 1), "place_error": (0, 0.15),
    "match_quality": (0.97, 1), "heading_error": (0, 0.15), "map_error_absent": (0, 8), "luma_drift": (0, 0.1), "colour_drift": (0, 0.1),
    "sharpness_drift": (0, 0.2), "motion_late": (0.8, 1.2), "motion_spike": (1, 1.6), "seam_ratio": (0.9, 1.1),
    "repeat_distance": (20, 255),
}  # fmt: skip
MOVED = {  # failure -> metric -> least and most: what finds it, all outside PERFECT
    "forget": {"identity_8s": (0, 0.3), "revisit_skill": (-1, 0.4), "place_error": (1.5, 99), "map_error_absent": (30, 255)},
    "over-expose": {"luma_drift": (0.5, 9), "map_error_absent": (20, 255)},
    "darken": {"luma_drift": (0.5, 9), "colour_drift": (0.5, 9), "hills_readable": (0, 0.8)},
    "noise": {"sharpness_drift": (5, 99), "match_quality": (0, 0.8), "motion_late": (5, 99)},
    "blur": {"sharpness_drift": (0.2, 9), "revisit_skill": (0, 0.8)},
    "stagnate": {"motion_late": (0, 0.1), "heading_error": (0.8, 99)},
    "reset": {"heading_error": (0.5, 99), "motion_spike": (2.5, 99)},
    "loop": {"repeat_distance": (0, 1), "heading_error": (1, 99), "motion_spike": (5, 99)},
}
ALONE = {  # failure -> metrics that must stay within PERFECT, because it is none of their business
    "forget": ("heading_error", "motion_late", "hills_readable"),
    "over-expose": ("identity_4s", "heading_error", "motion_spike"),
    "darken": ("place_error", "heading_error", "identity_4s"),
    "noise": ("heading_error", "map_error_absent", "luma_drift"),
    "blur": ("identity_8s", "heading_error", "luma_drift", "motion_late"),
    "stagnate": ("map_error_absent", "hills_readable"),
    "reset": ("revisit_skill", "map_error_absent", "luma_drift", "sharpness_drift"),
    "loop": ("map_error_absent", "luma_drift", "sharpness_drift"),
}


def measure(failure: str) -> dict[str, float]:
    found = [scores.score_video(FAILURES[failure](world), world.truth(FRAMES, FPS), PREFIX, **RULES).values for world in WORLDS]
    names = sorted({name for values in found for name in values})
    return {name: float(np.mean([values[name] for values in found if name in values])) for name in names}


def test_a_perfect_video_scores_perfect() -> None:
    found = measure("perfect")
    assert {name: found[name] for name, (low, high) in PERFECT.items() if not low - 1e-9 <= found[name] <= high + 1e-9} == {}


@pytest.mark.parametrize("failure", MOVED)
def test_each_failure_moves_its_metric_and_not_the_others(failure: str) -> None:
    found = measure(failure)
    for name, (low, high) in MOVED[failure].items():
        assert low <= found[name] <= high, f"{name} is {found[name]}"
        assert high < PERFECT[name][0] or low >= PERFECT[name][1], f"{name} of a perfect video would pass too"
    for name in ALONE[failure]:
        low, high = PERFECT[name]
        assert low - 1e-9 <= found[name] <= high + 1e-9, f"{name} is {found[name]}"


def test_exposure_is_no_forgetting() -> None:
    """Gain and bias are fitted, so over-exposure and darkness leave a skill that is nearer to perfect than to forgetting."""
    for failure in ("over-expose", "darken"):
        assert measure(failure)["revisit_skill"] > 0.65, failure


def test_a_seam_is_found_at_the_borders_of_chunks_alone() -> None:
    """A flash at every third latent's first frame; a video without a prefix has its first border at frame 9."""
    assert course.list_borders(46, first=0, latents=3, time=4).tolist() == [9, 21, 33, 45]
    assert course.list_borders(46, first=9, latents=3, time=4).tolist() == [9, 21, 33, 45]
    assert course.list_borders(100, first=9, latents=21, time=4).tolist() == [9, 93]
    video = np.random.default_rng(0).integers(100, 103, (46, 32, 32, 3), np.uint8)
    plain = course.score_course(video, scores.oracle.measure_motion(video), FPS, prefix=0, borders=np.array([9, 21, 33]))
    flashed = video.copy()
    for first in (9, 21, 33):
        flashed[first : first + 6] += 40
    motion = scores.oracle.measure_motion(flashed)
    ratios = [course.score_course(flashed, motion, FPS, prefix=0, borders=np.array(at))["seam_ratio"] for at in ([9, 21, 33], [10, 22, 34])]
    assert 0.8 < plain["seam_ratio"] < 1.2 and ratios[0] > 4 and ratios[1] < 0.3


def test_stutter_is_that_of_the_frames() -> None:
    video = np.random.default_rng(0).integers(0, 255, (46, 32, 32, 3), np.uint8)
    for first in (0, 9):
        found = dict(course.score_motion(scores.oracle.measure_motion(video), first))
        assert found["stutter"] == pytest.approx(measure_stutter(video, period=4, first=first), rel=1e-5)


def test_a_video_of_which_nothing_comes_back_has_no_such_metrics() -> None:
    """Also one that is too short, and one without a known world."""
    world = WORLDS[0]
    video = FAILURES["perfect"](world)[:17]
    found = scores.score_video(video, world.truth(17, FPS), 0, **RULES).values
    assert not {name for name in found if name.startswith(("identity", "revisit", "place", "match", "heading_error", "repeat"))}
    assert found["motion_late"] == pytest.approx(1, abs=0.3) and all(np.isfinite(value) for value in found.values())
    unknown = scores.score_video(video, None, 0, **RULES)
    assert {"sharpness", "motion", "motion_late", "seam_ratio"} <= unknown.values.keys() and unknown.view is None and not unknown.curves
