"""Every protocol on real frames, with small random networks: 832 x 480 clips in the folder that CF_CLIPS names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cf_model import scoring
from cf_model.data.video_reader import VideoFacts, probe_video, read_video
from cf_model.metrics import encoders, judges, long, protocols
from cf_model.metrics.trace import Networks, Trace, average_neighbours, trace_video
from tasks.files.settings import read_settings
from tests.metrics.small_networks import write_networks
from tests.once import made_once

CLIPS = read_settings().clips
pytestmark = pytest.mark.skipif(CLIPS is None or not CLIPS.is_dir(), reason="CF_CLIPS names no folder of real clips")
ALL = ("vbench", "vbench-long", "vbench-competition", "windows", "own")
FALLS = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness")  # when frames are shuffled
RISES = ("flow_magnitude", "flow_variance", "flow_variance_largest")


def list_clips() -> list[tuple[Path, VideoFacts]]:
    assert CLIPS is not None
    found = [(path, probe_video(path)) for path in sorted(CLIPS.glob("mixkit-*.mp4"))]
    return [(path, facts) for path, facts in found if (facts.width, facts.height) == (832, 480)]


def read(path: Path, facts: VideoFacts) -> np.ndarray:
    return read_video(path, height=facts.height, width=facts.width, fps=facts.fps)


@pytest.fixture(scope="module")
def networks() -> Networks:
    folder = made_once("small-metric-networks", write_networks)
    clip = encoders.ClipEncoder("clip", folder / "clip")
    return Networks(
        subject=encoders.open_encoder("dino", folder / "dino"),
        anchor=encoders.open_encoder("dinov2", folder / "dinov2"),
        background=clip,
        text=clip,
        interpolate=average_neighbours,
    )


def trace(video: np.ndarray, networks: Networks, fps: float) -> Trace:
    size = {"height": video.shape[1], "width": video.shape[2]}
    return trace_video((video[k : k + 32] for k in range(0, len(video), 32)), networks, frames=len(video), fps=fps, **size)


def score(traced: Trace, networks: Networks) -> dict[tuple[str, str], float]:
    cells = protocols.score_trace(traced, networks, ALL, prompt="a boat sails past the sea", chunk=3, window=4)
    return {(cell["protocol"], cell["metric"]): cell["value"] for cell in cells}


def test_a_shuffled_clip_is_worse_in_every_temporal_metric(networks: Networks) -> None:
    """In every protocol. The windows are not among them: they compare with frame 0 alone, whatever lies between."""
    path, facts = list_clips()[0]
    assert (facts.frames, facts.fps) == (81, 16)
    video = read(path, facts)
    # the first frame stays, because consistency compares all others with it
    shuffled = video[np.concatenate([[0], 1 + np.random.default_rng(0).permutation(80)])]
    traced = trace(video, networks, facts.fps)
    own, worse = score(traced, networks), score(trace(shuffled, networks, facts.fps), networks)
    assert own.keys() == worse.keys() and all(np.isfinite(value) for value in own.values())
    assert {protocol for protocol, _ in own} == {"vbench", long.UPSTREAM, long.FIXED, protocols.COMPETITION, "own"}
    compared = set()
    for (protocol, name), value in own.items():
        metric = name.partition("@")[0]
        if metric in FALLS:
            assert worse[protocol, name] < value, (protocol, name)
        elif metric in RISES:
            assert worse[protocol, name] > value, (protocol, name)
        compared.add(metric)
    assert compared >= {*FALLS, *RISES}
    rating = protocols.judge_video(traced, judges.HeuristicJudge(), "", key=path.name, repeats=2)
    assert 0 <= rating["value"] <= 100 and rating["agreement"] == 1


def test_windows_of_a_long_video_and_its_true_rate(networks: Networks) -> None:
    clips = list_clips()[:3]
    video = np.concatenate([read(path, facts)[::2, ::4, ::4] for path, facts in clips])  # 123 frames at 8 fps: 15 s, of three scenes
    plain = Networks(anchor=networks.anchor, background=networks.background, text=networks.text, make_flow=None)
    scores = score(trace(video, plain, 8), plain)
    windows = {name: value for (protocol, name), value in scores.items() if protocol == "windows"}
    assert set(windows) == {"dinov2_10s@dinov2", "clip_f_10s@clip", "clip_t_10s@clip"}
    rows = encoders.open_encoder("dinov2", made_once("small-metric-networks", write_networks) / "dinov2").encode(video)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert windows["dinov2_10s@dinov2"] == pytest.approx(100 * (rows[76:85] @ rows[0]).mean(), abs=1e-3)
    path, facts = clips[0]
    assert len(read_video(path, height=120, width=208, fps=facts.fps / 2)) == 40  # of 5.06 s


@pytest.mark.slow
def test_files_are_resampled_in_seconds_and_end_with_numbers_in_every_protocol(networks: Networks) -> None:
    """All clips of the folder at 4 frames a second, as `cf score` reads them; a manifest that states another rate than a file has."""
    assert CLIPS is not None
    clips = list_clips()
    rows = [{"file": path.name, "prompt": "a boat", "fps": facts.fps} for path, facts in clips] + [{"file": clips[0][0].name, "fps": 25.0}]
    how = scoring.Scoring(ALL, 4.0, 3, 2, 1, 600)
    scored = list(scoring.score_rows(rows, CLIPS, networks, judges.HeuristicJudge(), how))
    assert len(scored) == len(clips) + 1 and [cell["failed"] for cell in scored[-1]] == [
        f"{clips[0][0].name} has 16 frames a second and the manifest says 25; correct the one that is wrong"
    ]
    for cells in scored[:-1]:
        assert {cell["protocol"] for cell in cells} == {"vbench", long.UPSTREAM, long.FIXED, protocols.COMPETITION, "own"}
        assert all(np.isfinite(cell["value"]) and (cell["frames"], cell["fps"]) == (20, 4) for cell in cells)
        names = {cell["metric"].partition("@")[0] for cell in cells}
        assert names >= {*FALLS, *RISES, "dynamic_degree", "clip_score", "luma_slope", "seam_ratio", "visual_stability"}
    motion = [cell["value"] for cell in scored[0] if cell["metric"].startswith("flow_magnitude")]
    video = read(*clips[0])[::4]  # the frames at whole quarters of a second
    assert motion == [pytest.approx(score(trace(video[:20], networks, 4), networks)["own", "flow_magnitude@ffmpeg-epzs"], rel=1e-6)]
