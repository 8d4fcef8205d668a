"""The sets of worlds: what their cameras do, and how much of what they show only a long memory knows."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cf_model.data import worlds
from cf_model.data.worlds import World, WorldSpec, draw_world
from cf_model.evaluate.oracle import measure_slow_share, read_heading

SECONDS = np.arange(481) / 16
ORBIT, BURSTY = WorldSpec("orbit", "steady"), WorldSpec("pan", "bursty")
# of 40 frames of a clip, before there were other sets
BYTES = {0: "39651ad4a3e2a43feb24cb0f155e30f6", 7: "84c51d2227ade4c9f0bf280d691ab058"}


@pytest.mark.parametrize("seed", BYTES)
def test_the_plain_set_is_rendered_as_ever(seed: int) -> None:
    clip = worlds.render_clip(draw_world(seed, WorldSpec("pan", "steady")), 40, height=32, width=32, fps=16)
    assert hashlib.md5(clip.tobytes()).hexdigest() == BYTES[seed]


def test_sets_differ_in_the_camera_alone() -> None:
    for seed in range(8):
        plain, orbit, bursty = (draw_world(seed, spec) for spec in (worlds.PLAIN, ORBIT, BURSTY))
        for name in ("landmarks", "colour", "shape", "sky", "speed", "path", "centre"):
            assert getattr(plain, name) == getattr(orbit, name) == getattr(bursty, name), name
        assert orbit.caption == plain.caption.replace("pans", "circles") and bursty.caption == plain.caption


def test_an_orbit_goes_round_at_8_to_12_units_a_second_and_never_back() -> None:
    speeds = []
    for seed in range(40):
        world = draw_world(seed, ORBIT)
        steps = np.diff(world.heading(SECONDS)) * 16
        assert np.allclose(steps, world.turn) and (abs(world.turn) < 10) == (world.speed == "slow")
        speeds.append(world.turn)
    assert 8 <= np.abs(speeds).min() < 9 and 11 < np.abs(speeds).max() <= 12
    assert 10 < sum(speed < 0 for speed in speeds) < 30, "to both sides"


@pytest.mark.parametrize("path", ["pan", "orbit"])
def test_a_bursty_camera_rests_a_third_of_the_time_and_gets_as_far(path: str) -> None:
    for seed in range(8):
        steady, bursty = (draw_world(seed, WorldSpec(path, motion)) for motion in ("steady", "bursty"))  # type: ignore[arg-type]
        steps = np.abs(np.diff(bursty.heading(SECONDS)))
        assert 0.23 < (steps < 1e-9).mean() < 0.43
        assert bursty.heading(SECONDS[:1]) == steady.heading(SECONDS[:1])
        own = bursty.camera_seconds(SECONDS)
        assert (np.diff(own) >= -1e-9).all() and abs(own[-1] - SECONDS[-1]) <= worlds.BURST[1] / 3, "its clock is never far off"


def test_the_heading_of_an_orbit_is_read_off_its_frames() -> None:
    world = draw_world(3, ORBIT)
    clip = worlds.render_clip(world, 33, height=32, width=32, fps=16)
    off = (read_heading(clip)[0] - world.heading(np.arange(33) / 16) + worlds.PANORAMA / 2) % worlds.PANORAMA - worlds.PANORAMA / 2
    assert np.abs(off).max() < 1.5


def share(world: World, start: int, sink: int) -> float:
    return measure_slow_share(world.heading(SECONDS), start=start, target=21, sink=sink, fast=6, time=4)


def test_an_orbit_needs_the_slow_memory_and_a_pan_hardly() -> None:
    """Of windows that begin after 6 to 16 s; an orbit's memory has one sink frame, because three show more of the circle."""

    def mean(spec: WorldSpec, sink: int) -> float:
        return float(np.mean([share(draw_world(seed, spec), start, sink) for seed in range(20) for start in range(24, 64, 6)]))

    assert mean(ORBIT, 1) == pytest.approx(0.43, abs=0.03)
    assert mean(worlds.PLAIN, 3) == pytest.approx(0.11, abs=0.03)


def test_what_is_new_or_held_anyway_is_not_the_slow_parts() -> None:
    world = draw_world(0, ORBIT)
    assert share(world, 3, 1) == 0, "nothing was seen that the fast part has not"
    assert share(world, 42, 42) == 0, "a sink of everything"
    still = np.zeros(481)
    assert measure_slow_share(still, start=42, target=21, sink=0, fast=1, time=4) == 0
    there_and_away = np.repeat([0.0, 48.0, 0.0], [80, 88, 313])  # 20 latents here, 22 elsewhere, then back
    assert measure_slow_share(there_and_away, start=42, target=21, sink=0, fast=6, time=4) == 1
    assert measure_slow_share(there_and_away, start=42, target=21, sink=1, fast=6, time=4) == 0
