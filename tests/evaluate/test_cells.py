"""Cells: written and read back, what is refused of a file of them, and that all results of `evaluate` come from them alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cf_model.data.video import write_video
from cf_model.data.worlds import draw_world, render_clip
from cf_model.evaluate import oracle, scores
from cf_model.evaluate.cells import (
    expand_lines,
    fold_cells,
    group_curves,
    group_values,
    hash_code,
    list_protocols,
    refuse_other_protocols,
)
from tasks import evaluate
from tasks.params import load
from tests.evaluate.project import jsonl

ROOT = Path(__file__).parents[2]


def cell(**more: Any) -> dict[str, Any]:
    one = {"suite": "prompts", "system": "ours", "prompt": "a cat", "clip": None, "seed": 0, "file": "a.mp4", "md5": "1f"}
    return one | {"protocol": "own", "metric": "motion", "value": 1.0} | more


CELLS = [
    cell(), cell(metric="sharpness", value=2.5), cell(metric="sharpness", second=2.0, value=3.0),
    cell(file="b.mp4", seed=1, value=None, failed="the judge is down"),
    cell(file="b.mp4", seed=1, protocol="vbench", value=0.5, clips=[0.5]),
    cell(file=None, prompt=None, seed=None, metric="diversity", value=7.0),
]  # fmt: skip


def test_cells_come_back_and_a_video_is_described_once() -> None:
    lines = list(fold_cells(CELLS))
    assert expand_lines(lines, "x") == CELLS and sum("prompt" in line for line in lines) == 3
    assert lines[1] == {"of": lines[0]["id"], "metric": "motion", "value": 1.0}, "the protocol of all cells of a video stands with it"
    assert "protocol" not in lines[4] and lines[5]["protocol"] == "own"
    assert expand_lines(CELLS, "x") == CELLS, "lines that say all themselves are cells as they are"


def test_values_are_grouped_without_points_of_curves_failures_and_values_of_all_videos() -> None:
    own = [one for one in CELLS if one["protocol"] == "own"]
    assert group_values(own) == {("prompts", "ours", "motion"): {("a cat", 0): 1.0}, ("prompts", "ours", "sharpness"): {("a cat", 0): 2.5}}
    assert group_curves(CELLS) == {("prompts", "ours", "sharpness", 2.0): {"a cat": [3.0]}}


def test_a_file_that_was_cut_off_is_refused_or_loses_its_last_video() -> None:
    lines = list(fold_cells(CELLS))[:-3]
    with pytest.raises(ValueError, match=r"x has 1 of 2 cells of b\.mp4: it was cut off; score the videos again"):
        expand_lines(lines, "x")
    assert expand_lines(lines, "x", growing=True) == CELLS[:3]
    with pytest.raises(ValueError, match="x has a cell of 12ab, and no line says which video that is"):
        expand_lines([{"of": "12ab", "metric": "motion", "value": 1}], "x")


@pytest.mark.parametrize("more", [{}, {"prompt_id": "7", "file": "b.mp4"}])
def test_two_cells_of_one_place_are_refused(more: dict[str, Any]) -> None:
    """Of one file, or of one prompt and seed in two files."""
    pair = [cell(**more), cell(**more, value=2.0) | {"file": "a.mp4"}]
    with pytest.raises(ValueError, match=r"x has two cells for motion of ours, prompt .*, seed 0: of .*\.mp4 and of a\.mp4; keep one"):
        expand_lines(fold_cells(pair), "x")
    expand_lines([cell(**more), cell(**more, seed=1)], "x")


def test_other_protocols_are_not_compared() -> None:
    sides = [list_protocols([cell(protocol=name)]) for name in ("vbench", "vbench-long/fixed")]
    with pytest.raises(ValueError, match="motion in prompts is measured by protocol vbench in A and by vbench-long/fixed in B"):
        refuse_other_protocols(sides[0], sides[1])
    for other in (sides[0], list_protocols([cell(protocol=None)]), list_protocols([cell(metric="other")])):
        refuse_other_protocols(sides[0], other)
    with pytest.raises(ValueError, match="motion of ours in prompts has cells of the protocols vbench and vbench-long/fixed"):
        group_values([cell(protocol="vbench"), cell(protocol="vbench-long/fixed")])


def test_code_has_a_hash_of_its_source() -> None:
    assert hash_code(oracle) != hash_code(scores) and len(hash_code(oracle)) == 12


@pytest.mark.slow
def test_all_results_come_from_the_cells_alone(tmp_path: Path) -> None:
    """A second derivation, without videos, gives the same bytes; each video has its hash and the protocol its settings."""
    params = load.load_params(ROOT / "profiles/smoke.yaml")
    size = params.video
    rows, clips = [], []
    for number in range(3):
        world = draw_world(number)
        frames = render_clip(world, 49, height=size.height, width=size.width, fps=size.fps)
        file = f"prompts/real/{number:05d}-s0.mp4"
        (tmp_path / "samples" / file).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "samples" / file, frames, fps=size.fps, crf=18)
        clips.append({"id": f"clip-{number}", "truth": world.truth(49, size.fps)})
        row = {"suite": "prompts", "system": "real", "prompt": "p", "clip": f"clip-{number}", "seed": 0, "file": file}
        rows.append(row | {"prefix_frames": 0})
    jsonl(tmp_path / "samples/index.jsonl", rows)
    jsonl(tmp_path / "clips/clips.jsonl", clips)
    track = SimpleNamespace(progress=lambda total, what: SimpleNamespace(update=lambda: None))
    out = tmp_path / "results"
    first = evaluate.run(params, cast(Any, track), samples=tmp_path / "samples", clips=tmp_path / "clips", out=out)
    curves = (out / "curves.csv").read_bytes()
    assert first["prompts"]["real"]["videos"] == 3 and first["prompts"]["real"]["sky_accuracy"] > 0.9 and b"sky_error,0.0" in curves
    cells = expand_lines(map(json.loads, (out / "cells.jsonl").read_text().splitlines()), "x")
    assert {cell["protocol"] for cell in cells} == {"vbench", "world/1,fps=16,gap=5,absence=2,sink=3"}
    assert len({cell["md5"] for cell in cells if cell["file"]}) == 3
    (out / "curves.csv").unlink()
    assert evaluate.derive_results(params, out) == first and (out / "curves.csv").read_bytes() == curves
