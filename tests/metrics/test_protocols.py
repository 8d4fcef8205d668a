"""A trace is the same however the frames come in, and protocols read it as VBench's functions read whole videos."""

from __future__ import annotations

import numpy as np
import pytest

from cf_model.metrics import encoders, flow, long, protocols, summary, vbench
from cf_model.metrics.trace import Networks, Trace, average_neighbours, trace_video
from tests.metrics.test_measures import scrolling

POOLED = encoders.PooledEncoder()
NETWORKS = Networks(subject=POOLED, anchor=POOLED, background=POOLED, interpolate=average_neighbours)
RNG = np.random.default_rng(0)
VIDEO = np.clip(scrolling(45, 3) + RNG.normal(size=(45, 1, 1, 3)) * 5, 0, 255).astype(np.uint8)
FPS = 16.0


def trace(size: int, video: np.ndarray = VIDEO) -> Trace:
    pieces = (video[k : k + size] for k in range(0, len(video), size))
    return trace_video(pieces, NETWORKS, frames=len(video), fps=FPS, height=96, width=128)


@pytest.fixture(scope="module")
def whole() -> Trace:
    return trace(45)


@pytest.mark.parametrize("size", [1, 7])
def test_pieces_of_any_size_give_the_same_trace(size: int, whole: Trace) -> None:
    pieces = trace(size)
    for name in ("differences", "interpolation", "magnitudes", "sampled_flow", "thumbnails", "preview"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), atol=1e-6, err_msg=name)
    np.testing.assert_allclose(pieces.features["subject"], whole.features["subject"], atol=1e-4)
    assert pieces.anchors.keys() == whole.anchors.keys() == {0, 13}  # clips of 32 frames: 0 to 31 and 13 to 44
    assert len(whole.preview) == 6 and whole.preview_fps == 2


def test_a_clips_scores_are_those_of_its_frames_alone(whole: Trace) -> None:
    clips = protocols.score_clips(whole, NETWORKS)
    for number, frames in enumerate(long.split_into_clips(45, FPS)):
        video = VIDEO[frames.start : frames.stop]
        sampled = video[:: vbench.choose_interval(FPS)]
        fields = [vbench.score_flow(field) for field in flow.estimate_flow(sampled, flow.BlockMatchingFlow())]
        there = {
            "subject_consistency@pooled-8x8": vbench.score_consistency(POOLED.encode(video)),
            "temporal_flickering@unfiltered": vbench.score_flicker(vbench.measure_differences(video)),
            "motion_smoothness@mean": vbench.score_smoothness(vbench.measure_interpolation(video, average_neighbours)),
            "dynamic_degree@ffmpeg-epzs": float(vbench.decide_motion(fields, height=96, width=128, sampled=len(sampled))),
        }
        for name, value in there.items():
            assert clips[name][number] == pytest.approx(value, abs=1e-6), (name, number)


def test_both_variants_of_vbench_long_stand_side_by_side(whole: Trace) -> None:
    cells = {(cell["protocol"], cell["metric"]): cell for cell in protocols.score_long(whole, NETWORKS)}
    upstream, fixed = (cells[key] for key in cells if key[1].startswith("subject"))
    assert len(upstream["clips"]) == 2 and upstream["value"] == pytest.approx(np.mean(upstream["clips"]))
    fast = vbench.score_consistency(POOLED.encode(VIDEO[[0, 13]]))
    mapped = long.map_by_moments(fast, long.MOMENTS["subject_consistency"])
    assert fixed["value"] == pytest.approx((upstream["value"] + mapped) / 2, abs=1e-6)
    assert fixed["metric"] == "subject_consistency@pooled-8x8@pooled-8x8-fast"  # two substitutes


def test_a_video_that_is_shorter_than_it_said_is_refused() -> None:
    with pytest.raises(ValueError, match="the video has 44 frames, not 45 and at least 2; replace it by a whole one"):
        trace_video([VIDEO[:44]], NETWORKS, frames=45, fps=FPS, height=96, width=128)


def cell(protocol: str, metric: str, value: float | None, **more: object) -> dict[str, object]:
    return {"protocol": protocol, "metric": metric, "value": value} | more


def test_cells_are_averaged_by_their_protocols_rules() -> None:
    name = "subject_consistency"
    cells = [cell("vbench", name, 1.0, frames=11), cell("vbench", name, 0.0, frames=31)]
    cells += [cell(long.UPSTREAM, name, 1.0, clips=[1.0]), cell(long.UPSTREAM, name, 0.0, clips=[0.0] * 3)]
    cells += [cell(long.FIXED, name, 1.0), cell(long.FIXED, name, 0.0), cell("own", "x", 2.0), cell("own", "x", None, failed="no")]
    cells.append(cell("own", "y", None, failed="no"))
    means = summary.average_cells(cells)
    assert [means[protocol][name]["mean"] for protocol in ("vbench", long.UPSTREAM, long.FIXED)] == [0.25, 0.25, 0.5]
    assert means["own"] == {"x": {"videos": 1, "failed": 1, "mean": 2.0}, "y": {"videos": 0, "failed": 1}}


def test_aggregates_are_numbers_where_all_is_there_and_sentences_where_not() -> None:
    dimensions = {"aesthetic_quality": 0.5, "imaging_quality": 0.7, "clip_score": 0.3}
    cells = [cell(protocols.COMPETITION, name, value, clips=[value]) for name, value in dimensions.items()]
    found = summary.total_scores(summary.average_cells(cells), failed=0)
    assert found[f"{protocols.COMPETITION}/frame_wise_quality"] == pytest.approx(60)
    assert str(found[f"{protocols.COMPETITION}/text_alignment"]).startswith(
        "text_alignment needs 2 dimensions and lacks overall_consistency"
    )
    refused = summary.total_scores(summary.average_cells(cells), failed=2)
    assert all(str(value).startswith("2 of the videos could not be scored") for value in refused.values()) and len(refused) == 3
    half = [*cells, cell(protocols.COMPETITION, "imaging_quality", None, failed="no")]
    found = summary.total_scores(summary.average_cells(half), failed=0)
    assert "lacks imaging_quality" in str(found[f"{protocols.COMPETITION}/frame_wise_quality"])


def test_windows_are_scored_from_the_frames_that_they_hold() -> None:
    video = RNG.integers(0, 256, (88, 16, 16, 3), dtype=np.uint8)  # 11 s at 8 fps: the window at 10 s is frames 76 to 84
    plain = Networks(anchor=POOLED, background=POOLED, make_flow=None)
    traced = trace_video([video[:50], video[50:]], plain, frames=88, fps=8.0, height=16, width=16)
    cells = protocols.score_trace(traced, plain, ["windows"], prompt=None)
    rows = vbench.normalise_rows(POOLED.encode(video))
    expected = pytest.approx(100 * (rows[76:85] @ rows[0]).mean(), abs=1e-4)
    assert {cell["metric"]: cell["value"] for cell in cells} == {"dinov2_10s@pooled-8x8": expected, "clip_f_10s@pooled-8x8": expected}
    assert set(traced.anchors) == {*range(0, 88, 16), 72, *range(76, 85)}  # and the first frames of clips
