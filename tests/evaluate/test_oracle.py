"""Videos with one known defect each: the metric for this defect must react, and correct videos must pass.

The oracle is the module that measures a video against the facts of the world it shows.
"""

from dataclasses import replace

import numpy as np
import pytest

from cf_model.data import worlds
from cf_model.evaluate import oracle

FPS = 16
WORLDS = [worlds.draw_world(seed) for seed in range(8)]


def render(world, seconds=20):
    return worlds.render_clip(world, seconds * FPS + 1, height=32, width=32, fps=FPS)


@pytest.fixture(scope="module")
def videos():
    return [render(world) for world in WORLDS]


def mean(name, values):
    return float(np.mean([v[name] for v in values if name in v]))


def measure_prompts(videos, shown_worlds=WORLDS):
    """Measure each video against the world that its caption names."""
    return [oracle.prompt_metrics(oracle.read_frames(v), w.truth(1, FPS), FPS) for v, w in zip(videos, shown_worlds, strict=True)]


def find_visits(video):
    return oracle.find_visits(video, oracle.read_heading(video)[0])


def forgetful(world):
    """Render a video whose landmarks change every five seconds, as those of a model without memory do."""
    parts = [replace(world, landmarks=worlds.draw_world(world.seed + 100 * (i + 1)).landmarks) for i in range(4)]
    return np.concatenate([render(part)[i * 5 * FPS : (i + 1) * 5 * FPS] for i, part in enumerate(parts)])


def test_a_visits_colour_is_the_median_over_its_frames_of_the_columns_near_the_bins_middle(videos):
    """All visits are measured at once; this is the definition, one visit at a time. Both parities of a visit's length are there."""
    video, turn = videos[0], oracle.read_heading(videos[0])[0]
    visits = oracle.find_visits(video, turn)
    assert {(visit.last - visit.first) % 2 for visit in visits} == {0, 1} and len(visits) > oracle.BINS
    assert [(visit.first, visit.bin) for visit in visits] == sorted((visit.first, visit.bin) for visit in visits)
    for visit in visits:
        place = oracle.wrap_heading(visit.bin * oracle.BIN + oracle.BIN / 2 - turn)
        inside = (place > oracle.EDGE) & (place < 32 - oracle.EDGE)
        assert inside[visit.first : visit.last].all() and not inside[visit.last : visit.last + 1].any()
        assert not inside[max(0, visit.first - 1) : visit.first].any()
        frames = range(visit.first, visit.last)
        columns = [np.rint(place[k]).astype(int) + np.arange(-1, 2) for k in frames]
        strips = [video[k, worlds.LANDMARK_ROWS][:, near].mean(axis=1) for k, near in zip(frames, columns, strict=True)]
        np.testing.assert_array_equal(visit.colour, np.median(strips, axis=0))


def test_a_video_that_shows_no_bin_long_enough_has_no_visits(videos):
    video = videos[0][: oracle.SHORTEST_VISIT - 1]
    assert oracle.find_visits(video, oracle.read_heading(video)[0]) == []


def test_heading_is_read_to_a_fraction_of_a_pixel(videos):
    for video, world in zip(videos, WORLDS, strict=True):
        true = world.heading(np.arange(len(video)) / FPS)
        off = (oracle.read_heading(video)[0] - true + worlds.PANORAMA / 2) % worlds.PANORAMA - worlds.PANORAMA / 2
        assert np.abs(off).mean() < 0.6


def test_a_correct_video_passes_all_metrics(videos):
    found = measure_prompts(videos)
    for name in ("compass_coherence", "sky_accuracy", "sprite_recall"):
        assert mean(name, found) > 0.98, name
    assert mean("shape_accuracy", found) > 0.95 and mean("sprite_precision", found) > 0.85


@pytest.mark.parametrize(("attribute", "metric"), [("colour", "sprite_recall"), ("sky", "sky_accuracy"), ("shape", "shape_accuracy")])
def test_a_wrong_caption_lowers_its_metric(videos, attribute, metric):
    others = {"colour": list(worlds.COLOURS), "sky": list(worlds.SKIES), "shape": list(worlds.SHAPES)}[attribute]
    wrong = [replace(w, **{attribute: others[(others.index(getattr(w, attribute)) + 1) % len(others)]}) for w in WORLDS]
    assert mean(metric, measure_prompts(videos, wrong)) < 0.25


def test_fast_is_faster_than_slow(videos):
    speeds = {s: [m["speed"] for m, w in zip(measure_prompts(videos), WORLDS, strict=True) if w.speed == s] for s in worlds.SPEEDS}
    assert max(speeds["slow"]) < min(speeds["fast"])


def test_memory_ratio_tells_memory_from_none(videos):
    def ratio(shown):
        found = [oracle.memory_metrics(find_visits(v), FPS, 2.0, kept=oracle.find_bins_in_view(v[:9])) for v in shown]
        both = [m for m in found if "same_heading" in m]
        assert len(both) >= 6
        return mean("same_heading", both) / mean("other_heading", both)

    assert ratio(videos) < 0.05 and ratio(map(forgetful, WORLDS)) > 0.7


def test_a_heading_of_the_sink_and_slow_drift_are_no_forgetting():
    """Bin 0 changes by 10 at each visit, 20 from its first; bin 9 changes by 90, but the sink shows it."""
    dark = np.zeros((7, 3))
    found = [oracle.Visit(b, 100 * n, 100 * n + 10, dark + (10 if b == 0 else 90) * n) for n in range(3) for b in (0, 9)]
    assert oracle.memory_metrics(found, FPS, 2.0, kept={9})["same_heading"] == pytest.approx(10)
    assert oracle.memory_metrics(found, FPS, 2.0, kept=())["same_heading"] == pytest.approx(50)
    assert oracle.memory_metrics([], FPS, 2.0, kept=()) == {"headings_covered": 0}


def test_an_identity_is_that_of_the_last_visit_by_the_seconds_out_of_sight():
    """Bins 1, 4, 7 … are the middles of hills: bin 1 changes its colour after 3 s and keeps it for 10 s; bin 4 is grey once."""

    def visit(b, first, last, name):
        return oracle.Visit(b, first, last, np.tile(np.array(worlds.COLOURS.get(name, (128, 128, 128)), float) + 12, (7, 1)))

    found = [visit(1, 0, 16, "red"), visit(2, 0, 16, "red"), visit(4, 0, 16, "grey"), visit(1, 64, 80, "blue"), visit(4, 64, 80, "green")]
    found += [visit(1, 240, 256, "blue"), visit(4, 240, 250, "green"), visit(2, 240, 256, "cyan")]
    measured = oracle.identity_metrics(found, FPS, kept=())
    assert measured == {"identity_2s": 0.0, "identity_8s": 1.0, "hills_readable": pytest.approx(5 / 6)}
    assert "identity_2s" not in oracle.identity_metrics(found, FPS, kept={1}), "what the sink shows tests nothing"


def test_the_bins_in_view_are_those_between_the_pictures_edges(videos):
    heading = oracle.read_heading(videos[0][:1])[0][0]
    seen = oracle.find_bins_in_view(videos[0][:1])
    assert seen == {b for b in range(24) if (4 * b + 2 - heading) % 96 < 32} and len(seen) == 8


def test_map_error_counts_what_was_long_out_of_sight(videos):
    truths = [w.truth(1, FPS) for w in WORLDS]
    asked = {"unit": 1, "fps": FPS, "gap": 5.0, "absence": 2.0, "kept": ()}
    true = [oracle.map_metrics(find_visits(v), t, prefix=10 * FPS + 1, **asked) for v, t in zip(videos, truths, strict=True)]
    wrong = [oracle.map_metrics(find_visits(forgetful(w)), t, prefix=80, **asked) for w, t in zip(WORLDS, truths, strict=True)]
    assert sum("map_error" in m for m in true) >= 4
    assert mean("map_error", true) < 12 < 40 < mean("map_error", wrong)


def test_map_error_is_of_the_long_absent_and_nothing_else():
    """A return counts by how long a bin, a section of the panorama, was out of sight. The prefix is the first 160 frames, which are given.

    Bin 0 returns after 9.4 s with a wrong colour and alone makes `map_error`, because `gap` is 5 s. Bin 1 returns after 1.9 s with the
    right colour. Bin 2 has a wrong colour and counts nowhere, because the prefix never showed it. Bins 3 and 4 return after 2.5 s.
    """
    truth = WORLDS[0].truth(1, FPS)
    band = worlds.paint_panorama(tuple(truth["landmarks"]), truth["sky"], 1)[worlds.LANDMARK_ROWS]

    def true_colour(b):
        middle = b * oracle.BIN + oracle.BIN // 2
        return band[:, middle - 1 : middle + 2].mean(axis=1)

    def visit(b, first, last, off=0.0):
        return oracle.Visit(b, first, last, true_colour(b) + off)

    found = [visit(0, 0, 50), visit(1, 0, 150), visit(2, 170, 190, 90.0)]
    found += [visit(1, 180, 220), visit(0, 200, 240, 50.0), visit(2, 300, 320, 90.0)]
    found += [visit(3, 0, 140), visit(4, 0, 140), visit(3, 180, 220, 30.0), visit(4, 180, 220, 70.0)]  # both 2.5 s later
    errors = oracle.map_metrics(found, truth, unit=1, prefix=160, fps=FPS, gap=5.0, absence=2.0, kept={4})
    assert errors["map_error"] == pytest.approx(50) and errors["map_error_recent"] == pytest.approx(100 / 3)
    assert errors["map_error_absent"] == pytest.approx(40), "bins 0 and 3; bin 4 stands in the sink"


def test_blur_freezing_and_the_same_landmarks_everywhere_lower_their_metrics(videos):
    blurred = [np.repeat(np.repeat(v[:, ::4, ::4], 4, 1), 4, 2) for v in videos]
    frozen = [np.repeat(v[:1], len(v), 0) for v in videos]
    assert mean("compass_coherence", measure_prompts(blurred)) < mean("compass_coherence", measure_prompts(videos))
    assert mean("motion", measure_prompts(frozen)) == 0 and mean("speed", measure_prompts(frozen)) == 0
    same = [render(replace(w, landmarks=WORLDS[0].landmarks)) for w in WORLDS]

    def spread(many):
        return oracle.measure_diversity([oracle.build_map(find_visits(v)) for v in many], ["any"] * len(many))

    assert spread(same) < 0.5 * spread(videos)
    assert oracle.heading_perplexity([np.full(100, 3.0)]) == pytest.approx(1)
    assert oracle.heading_perplexity([np.linspace(0, 95.9, 960)]) == pytest.approx(12, abs=0.1)


def test_sizes_do_not_change_what_is_measured():
    world = WORLDS[0]
    small, large = (worlds.render_clip(world, 81, height=h, width=h, fps=FPS) for h in (32, 64))
    a, b = (oracle.prompt_metrics(oracle.read_frames(v), world.truth(1, FPS), FPS) for v in (small, large))
    for name in ("compass_coherence", "sky_accuracy", "sprite_recall", "speed", "shape_accuracy"):
        assert a[name] == pytest.approx(b[name], abs=0.1), name


def test_slow_columns_are_those_that_neither_sink_nor_fast_part_shows():
    """The camera turns by half a column (4 units) a latent for ten latents, and then back. A latent is four frames, a chunk one latent."""
    path = np.array([*range(0, 44, 4), *range(36, -4, -4)], float)
    chosen = oracle.select_slow_columns(np.repeat(path, 4), start=11, chunk=1, sink=2, fast=3, columns=4, frames=10, time=4)
    # Latent 13 shows 28..60 and the fast part has 32..72: half of the column 28..36 is news to it, and far from the sink's 0..36.
    assert not chosen[:3].any(), "on turning, the fast part still has all"
    assert [row.tolist() for row in chosen[3:9]] == [[False] * 4] * 6, "the sink shows the columns up to 36"
    apart = np.repeat(path + np.where(path > 8, 32, 0), 4)  # the same, but the sink's place is seen by the sink alone
    far = oracle.select_slow_columns(apart, start=11, chunk=1, sink=2, fast=3, columns=4, frames=7, time=4)
    assert [row.tolist() for row in far[3:]] == [[True, False, False, False]] * 4
    never = oracle.select_slow_columns(np.arange(72) * 0.5, start=12, chunk=1, sink=1, fast=1, columns=4, frames=6, time=4)
    assert not never.any(), "a camera that only goes on sees nothing again before it has gone round"


def test_an_unrolled_video_shows_the_world_where_it_was_seen(videos):
    """The panorama that the video was cut from, but for the sprite, and white where the camera never was."""
    world, video = WORLDS[0], videos[0]
    circle, truth = oracle.unroll_panorama(video), oracle.paint_truth(world.truth(1, FPS), 1)
    assert circle.shape == truth.shape == (24, 96, 3)
    heading = world.heading(np.arange(len(video)) / FPS)
    seen = np.zeros(96, bool)
    for h in heading:
        seen[(int(np.ceil(h)) + np.arange(31)) % 96] = True
    low = slice(13, 24)  # below the sprite
    turned = np.roll(truth, 12, axis=1)
    off, wrong = (np.abs(circle[low].astype(float) - where[low])[:, seen].mean() for where in (truth, turned))
    assert off < 6 < 30 < wrong, "up to half a unit of rounding at the hills' edges, and no hill at its neighbour's place"
    assert 8 < (~seen).sum() < 70 and (circle[:, ~seen] == 255).mean() > 0.9
