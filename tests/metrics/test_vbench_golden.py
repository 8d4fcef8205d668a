"""VBench's formulas against the numbers of VBench's own code at 45e79ec (tests/golden/eval/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cf_model.data.video_reader import probe_video, read_video
from cf_model.metrics import long, preprocess, summary, totals, vbench

GOLDEN = Path(__file__).parent.parent / "golden/eval"
TIGHT = {"rtol": 0, "atol": 2e-6}  # VBench adds in float32


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def close(ours: object, theirs: object, **limits: float) -> None:
    np.testing.assert_allclose(ours, theirs, **(TIGHT | limits))  # type: ignore[arg-type]


@pytest.mark.parametrize("dimension", ["subject", "background"])
def test_consistency(dimension: str) -> None:
    golden = load("consistency")
    videos = np.split(golden["feats"], np.cumsum(golden["lens"])[:-1])
    scores = [vbench.score_consistency(video) for video in videos]
    close(scores, golden[f"{dimension}_per_video"])
    cells = [{"protocol": "vbench", "metric": f"{dimension}_consistency", "frames": len(video)} for video in videos]
    close(np.average(scores, weights=[summary.weigh_video(cell) for cell in cells]), golden[f"{dimension}_overall"])
    if dimension == "subject":
        close(np.mean(scores), golden["subject_overall_multi_gpu"])


@pytest.mark.parametrize("video", range(4))
def test_motion_smoothness(video: int) -> None:
    golden = load("motion_smoothness")
    errors = vbench.measure_interpolation(golden[f"frames{video}"], lambda a, b: (a + b) / 2)
    close(vbench.score_smoothness(errors), golden[f"score{video}"])


def test_dynamic_degree_of_flow_fields() -> None:
    golden = load("dynamic_degree")
    close([vbench.score_flow(flow) for flow in golden["flows"]], golden["flow_scores"], rtol=1e-6)


def test_dynamic_degree_decides_which_videos_move() -> None:
    golden = load("dynamic_degree")
    for (height, width, sampled, threshold, needed, fast), moves in zip(golden["check_params"], golden["check_moves"], strict=True):
        assert vbench.MOVING * min(height, width) == threshold and round(sampled / 4) == needed
        scores = [threshold + 0.1] * int(fast) + [threshold] * int(sampled - 1 - fast)
        assert vbench.decide_motion(scores, height=int(height), width=int(width), sampled=int(sampled)) == moves


def test_dynamic_degree_from_flows_to_the_decision() -> None:
    golden = load("dynamic_degree")
    for lengths, moves in zip(golden["e2e_mags"], golden["e2e_moves"], strict=True):
        scores = [vbench.score_flow(np.full((2, 20, 30), length / np.sqrt(2), np.float32)) for length in lengths]
        assert vbench.decide_motion(scores, height=256, width=256, sampled=16) == moves
    close(vbench.share_moving(golden["e2e_moves"]), 0.25)


def test_dynamic_degree_keeps_eight_frames_a_second() -> None:
    for fps, _, frames, sampled in load("dynamic_degree")["mp4_fps_cvfps_frames_kept"]:
        assert len(range(0, int(frames), vbench.choose_interval(fps))) == sampled


def test_temporal_flickering() -> None:
    golden = load("temporal_flickering")
    differences = vbench.measure_differences(golden["frames"])
    close(differences, golden["mae"], rtol=1e-6)
    close(vbench.score_flicker(differences), golden["score"])


def test_imaging_quality_resizes_and_averages() -> None:
    golden = load("frame_quality")
    for mode, height, width, tall, wide in golden["resize_cases"]:
        shown = preprocess.prepare_imaging(torch.zeros(1, 3, height, width), preprocess.RESIZING[mode])
        assert tuple(shown.shape[-2:]) == (tall, wide), (preprocess.RESIZING[mode], height, width)
    scores = []
    for video in ("video0", "video1"):
        ratings = 100 * preprocess.prepare_imaging(torch.from_numpy(golden[video])).mean(dim=(1, 2, 3)).numpy()
        scores.append(vbench.score_imaging(ratings))
    close(scores, golden["imaging_per_video"] / 100)
    close(np.mean(scores), golden["imaging_overall"])


def test_aesthetic_quality() -> None:
    golden = load("frame_quality")
    head = golden["aes_weight"][0], float(golden["aes_bias"][0])
    scores = [vbench.score_aesthetics(golden[f"aes_feat{video}"], *head) for video in range(2)]
    close(scores, golden["aes_per_video"])
    close(np.mean(scores), golden["aes_overall"])


def test_frames_are_prepared_to_the_pixel() -> None:
    golden = load("preprocess")
    image = torch.from_numpy(golden["image"])
    close(preprocess.prepare_dino(image, 32), golden["dino32"], atol=1e-5)
    close(preprocess.prepare_clip(image, 32), golden["clip32"], atol=1e-5)


def test_middle_frames_are_sampled() -> None:
    golden = load("preprocess")
    for total in (1, 5, 8, 9, 16, 17, 81, 160, 957, 969):
        assert preprocess.sample_middle_frames(8, total).tolist() == golden[f"mid8_{total}"].tolist()


def test_totals() -> None:
    golden = load("total_score")
    names = [key.replace(" ", "_") for key in golden["keys"]]
    for row, (raw, columns) in enumerate(zip(golden["dims"], golden["quality_semantic_total"], strict=True)):
        values = np.zeros(16) if row == 2 else raw  # row 2: all missing, which VBench counts as 0
        close(totals.compute_totals(dict(zip(names, values, strict=True))), columns)


def test_long_videos_are_split() -> None:
    golden = load("long_split")
    for case, (frames, fps, seconds, count) in enumerate(golden["cases"]):
        rows = [[case, len(clip), clip[0], clip[-1]] for clip in long.split_into_clips(int(frames), float(fps), int(seconds))]
        assert len(rows) == count and rows == golden["rows"][golden["rows"][:, 0] == case].tolist()


def test_long_videos_keep_a_result_a_clip() -> None:
    golden = load("long_fuse")
    close(golden["per_video"], golden["clip_scores"])  # upstream's grouping by video leaves every clip alone
    clips = [part.tolist() for part in np.split(golden["clip_scores"], np.cumsum(golden["clip_counts"])[:-1])]
    close(long.average_upstream(clips, [None] * 3, long.IN_CLIP_ONLY, {}), golden["overall"])


@pytest.mark.parametrize("dimension", ["sb", "bg"])
@pytest.mark.parametrize("fused", [0, 1])
def test_branches_are_fused_with_a_small_table(dimension: str, fused: int) -> None:
    golden = load("long_fuse")
    table, weights = (
        dict(zip(golden["toy_keys"].tolist(), golden["toy_values"].tolist(), strict=True)),
        (long.IN_CLIP_ONLY, long.BOTH)[fused],
    )
    clips = [part.tolist() for part in np.split(golden["clip_scores"], np.cumsum(golden["clip_counts"])[:-1])]
    fast = [*golden["clip2clip"].tolist(), None]
    name = f"toy_{dimension}_dev{fused}"
    mapped = np.repeat([long.map_by_table(score or 0.0, table) for score in fast], golden["clip_counts"])
    close(mapped, golden[f"{name}_mapped"])
    close([long.fuse_branches(a, b, weights) for a, b in zip(golden["clip_scores"], mapped, strict=True)], golden[f"{name}_fused"])
    close(long.average_upstream(clips, fast, weights, table), golden[f"{name}_overall"])


@pytest.mark.parametrize("dimension", ["sb", "bg"])
@pytest.mark.parametrize("fused", [0, 1])
def test_branches_are_fused_with_the_shipped_tables(dimension: str, fused: int) -> None:
    """The tables themselves are VBench's and not here; what they gave is in the golden file."""
    golden, weights = load("long_fuse"), (long.IN_CLIP_ONLY, long.BOTH)[fused]
    name = f"real_{dimension}_dev{fused}"
    ours = [long.fuse_branches(a, b, weights) for a, b in zip(golden["clip_scores"], golden[f"{name}_mapped"], strict=True)]
    close(ours, golden[f"{name}_fused"])
    close(np.mean(ours), golden[f"{name}_overall"])


def test_tables_have_quantiles_as_keys() -> None:
    golden = load("long_quantile_map")
    mapped, table = long.build_quantile_table(golden["inclip"], golden["clip2clip"], 0.05)
    close(mapped, golden["mapped"])
    close(list(table), golden["table_keys"])
    close(list(table.values()), golden["table_values"])


def test_text_alignment() -> None:
    golden = load("text_alignment")
    clip = [vbench.score_text(image, text[0]) for image, text in zip(golden["clip_image"], golden["clip_text"], strict=True)]
    whole = [vbench.score_text(video, text[0]) for video, text in zip(golden["viclip_video"], golden["viclip_text"], strict=True)]
    close(clip, golden["clip_score_per_video"])
    close(np.mean(clip), golden["clip_score"])
    close(whole, golden["overall_per_video"])
    close(np.mean(whole), golden["overall"])
    scores = {"clip_score": float(np.mean(clip)), "overall_consistency": float(np.mean(whole))}
    close(totals.compute_competition(scores, "text_alignment"), golden["text_alignment"])


def test_a_file_from_its_bytes_to_its_scores() -> None:
    golden, path = load("mp4_pool_feature"), GOLDEN / "moving_square.mp4"
    facts = probe_video(path)
    video = read_video(path, height=facts.height, width=facts.width, fps=facts.fps)
    np.testing.assert_array_equal(video.transpose(0, 3, 1, 2), golden["decoded"])
    frames = preprocess.make_tensor(video)
    scores = {}
    for name, prepare in {"subject": preprocess.prepare_dino, "background": preprocess.prepare_clip}.items():
        scores[name] = vbench.score_consistency(F.adaptive_avg_pool2d(prepare(frames), 4).flatten(1).numpy())
        close(scores[name], golden[name], atol=1e-5)
    sampled = len(range(0, facts.frames, vbench.choose_interval(facts.fps)))
    assert sampled == golden["dynamic_frames"] and bool(golden["dynamic"])
