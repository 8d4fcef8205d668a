"""Every failure that a video is given is found at its second, and a good video has none."""

from __future__ import annotations

import numpy as np
import pytest

from cf_model.data import worlds
from cf_model.evaluate.failures import find_failures

FPS = 16


def render(seconds: float = 20) -> np.ndarray:
    return worlds.render_clip(worlds.draw_world(5), round(seconds * FPS) + 1, height=32, width=32, fps=FPS)


@pytest.mark.parametrize("number", range(6))
def test_a_good_video_has_no_failure(number: int) -> None:
    video = worlds.render_clip(worlds.draw_world(number), 20 * FPS + 1, height=32, width=32, fps=FPS)
    assert find_failures(video, fps=FPS) == []


def test_each_failure_is_found_where_it_is() -> None:
    video = render()
    reset = video.copy()
    reset[10 * FPS :] = video[: len(video) - 10 * FPS]
    stalled = video.copy()
    stalled[8 * FPS : 13 * FPS] = video[8 * FPS]
    bright = video.copy()
    bright[12 * FPS :] = np.minimum(255, video[12 * FPS :].astype(int) * 2)
    black = video.copy()
    black[15 * FPS :] = 0
    (found,) = find_failures(reset, fps=FPS)
    assert found["kind"] == "reset" and found["second"] == pytest.approx(10, abs=0.25)
    (found,) = [row for row in find_failures(stalled, fps=FPS) if row["kind"] == "stall"]
    assert found["second"] == pytest.approx(8, abs=0.25) and found["seconds"] == pytest.approx(5, abs=0.5)
    (found,) = [row for row in find_failures(bright, fps=FPS) if row["kind"] == "exposure"]
    assert found["second"] == pytest.approx(12, abs=0.25) and float(found["size"]) > 1.35
    kinds = [row["kind"] for row in find_failures(black, fps=FPS)]
    assert set(kinds) == {"jump", "exposure", "stall"}


def test_a_real_prefix_is_not_the_systems_failure() -> None:
    video = render()
    video[2 * FPS : 5 * FPS] = video[2 * FPS]
    assert find_failures(video, fps=FPS)[0]["kind"] == "stall"
    later = find_failures(video, fps=FPS, first=6 * FPS + 1)
    assert later == []


def test_stutter_is_no_jump() -> None:
    video = render().repeat(4, axis=0)[1::4]
    video[1:] = video[1:][np.arange(len(video) - 1) // 4 * 4]
    assert find_failures(video, fps=FPS) == []
    assert find_failures(video[:3], fps=FPS) == []
