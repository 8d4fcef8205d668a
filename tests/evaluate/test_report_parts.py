"""Parts of the report by themselves: the choice of cases, the planes, the paper's tables, the card and its banner, the contact sheet."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate.project import FPS, drawn, make_params, write_mp4
from PIL import Image

from cf_model.data.contact_sheet import HEIGHT, draw_clips
from cf_model.evaluate.cases import choose_cases
from cf_model.evaluate.figures import draw_differences
from cf_model.evaluate.page import list_failures
from cf_model.evaluate.planes import draw_planes, list_plane_rows, measure_drift
from cf_model.evaluate.provenance import count_expected, list_provenance, list_warnings
from cf_model.evaluate.report import Results, compare_stages, describe_metric
from cf_model.evaluate.rule_histograms import list_bins, sort_by_fate
from cf_model.evaluate.twins import build_twins
from cf_model.metrics.pooled import score_pooled
from cf_model.metrics.totals import recompute_printed_total


def results(**metrics: dict[str, list[float]]) -> Results:
    """By system__metric of the suite prompts: a value for each prompt p0, p1, …"""
    cells = {}
    for key, values in metrics.items():
        system, metric = key.split("__")
        cells["prompts", system, metric.replace("_AT_", "@").replace("_DASH_", "-")] = {(f"p{k}", 0): v for k, v in enumerate(values)}
    return Results(cells, {}, resamples=50, seed=0)


def test_the_worst_come_first_then_the_most_changed_then_the_first() -> None:
    found = results(before__same_heading=[5, 5, 5, 5, 5, 5, 50, 5], after__same_heading=[1, 2, 3, 90, 4, 80, 5, 70])  # type: ignore[arg-type]
    items = [f"p{k}" for k in range(8)]
    cases = choose_cases(found, "prompts", items, "after", "before", 8)
    assert [case.item for case in cases] == ["p3", "p5", "p7", "p6", "p0", "p1", "p2", "p4"]
    assert cases[0].why == "among the worst of after: same heading 90.0"
    assert cases[3].why == "among the most changed from before to after: same heading 50.0 to 5.00"
    assert cases[-1].why.startswith("among the first")
    assert [case.item for case in choose_cases(Results({}, {}, 1, 0), "prompts", items, "after", None, 3)] == ["p0", "p1", "p2"]


def test_a_metric_that_higher_is_better_in_is_worst_where_it_is_low() -> None:
    found = results(s__sprite_recall=[0.9, 0.1, 0.5])  # type: ignore[arg-type]
    assert choose_cases(found, "prompts", ["p0", "p1", "p2"], "s", None, 3)[0].item == "p1"


def test_drift_is_the_mean_of_three_slopes_of_the_videos_that_have_all() -> None:
    slopes: dict[str, Any] = {"s__luma_drift": [0.3, 0.0, 0.5], "s__colour_drift": [0.6, 0.0, 0.5], "s__sharpness_drift": [0.0, 0.3]}
    slopes |= {f"real__{name}_drift": [0.0, 0.03] for name in ("luma", "colour", "sharpness")}
    found = results(**slopes, s__same_heading=[1, 2], s__other_heading=[2, 2], real__same_heading=[1, 1], real__other_heading=[4, 4])  # type: ignore[arg-type]
    assert measure_drift(found, "prompts", "s") == {"p0": [pytest.approx(0.3)], "p1": [pytest.approx(0.1)]}
    assert measure_drift(found, "prompts", "none") == {}
    (plane,) = draw_planes(found, {"prompts": ["s", "real"]}, {"s": "#112233", "real": "#808080"})
    assert [row["system"] for row in plane["rows"]] == ["s", "real"] and plane["svg"].startswith("<svg")
    table = list_plane_rows([plane])
    assert table[0][:3] == ["suite", "system", "drift"] and table[1][:3] == ["prompts", "s", 0.2]


def test_twins_show_published_rows_and_measured_ones_by_their_own_name() -> None:
    found = results(s__dinov2_10s_AT_pooled_DASH_8x8=[80, 90], s__dinov2_10s=[70], s__subject_consistency=[0.5])  # type: ignore[arg-type]
    one, two, three = build_twins(found, ["s"], {"s": 5.25}, {"s": 30.5}, recompute_printed_total)
    assert one["columns"][1] == "DINOv2 10 s" and "arXiv 2602.06028" in one["citation"]
    assert {row["name"] for row in one["published"]} >= {"LongLive", "Context Forcing, student", "Context Forcing, teacher"}
    own, pooled = one["measured"]
    assert (own["network"], own["cells"][1].mean) == ("", 70) and (pooled["network"], pooled["cells"][1].mean) == ("pooled-8x8", 85)
    assert own["cells"][0].mean == 5.25 and sum(cell is not None for cell in own["cells"]) == 2, (
        "30 s videos have no place among consistencies of 60 s"
    )
    assert two["measured"] == three["measured"] == []
    assert one["published"][0]["cells"][:2] == ["9.2", "81.86"] and one["published"][3]["cells"][0] == "20+"
    assert any("82.06" in note for note in two["notes"]), "the paper's own total contradicts its parts"
    (whole,) = build_twins(found, ["s"], {}, {"s": 60.5}, recompute_printed_total)[2]["measured"]
    assert [cell.mean for cell in whole["cells"] if cell] == [50.0]


def row(system: str, number: int) -> dict[str, Any]:
    return {"suite": "prompts", "system": system, "prompt": f"p{number}", "seed": 0, "clip": None, "file": f"{system}/{number:05d}-s0.mp4"}


def test_what_is_partial_or_substituted_is_said_in_red() -> None:
    params = make_params()
    index = [row(system, k) for system in params.generate.systems for k in range(10)]
    said = list_warnings(params, index, results(stage2__dinov2_10s_AT_pooled_DASH_8x8=[1.0]), ["a.mp4 is cut off"])  # type: ignore[arg-type]
    assert [sentence.partition(":")[0] for sentence in said] == ["Partial", "Partial", "Failed", "Substituted"]
    assert "40 of the 130 videos" in said[0] and "dinov2_10s@pooled-8x8" in said[3]
    generate = params.generate.model_copy(update={"continuations": {}, "seeds": [0]})
    assert list_warnings(params.model_copy(update={"generate": generate}), index, Results({}, {}, 1, 0), []) == []
    card = dict(list_provenance(params, index, ["world/1"], {"stage2": "abc.dir"}, []))
    assert card["videos"] == ["40 of 130"] and card["made of (DVC's md5)"] == ["stage2 abc.dir"]
    assert card["prompts"][0].startswith("10 different, SHA-256") and card["networks that score"][0].startswith("none")


def test_clips_have_pictures_and_a_bad_file_has_none(tmp_path: Path) -> None:
    write_mp4(tmp_path / "good.mp4", drawn("", 1, 4 * FPS))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows = [
        {"id": "a", "file": "good.mp4", "start": None},
        {"id": "b", "file": "good.mp4", "start": 2 * FPS},
        {"id": "c", "file": "bad.mp4"},
    ]
    pictures = draw_clips(rows, tmp_path, fps=FPS, workers=1, timeout=60)
    assert pictures.keys() == {"a", "b"} and pictures["a"] != pictures["b"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))).size for p in pictures.values()]
    assert sizes == [(3 * HEIGHT, HEIGHT), (2 * HEIGHT, HEIGHT)]


def test_clips_by_fate_and_the_table_of_the_rules() -> None:
    manifest = [{"id": f"c{k}", "kept": k < 9, "reason": None if k < 9 else "frozen", "values": {"frozen": float(k)}} for k in range(12)]
    fates = sort_by_fate(manifest)
    assert {fate: len(rows) for fate, rows in fates.items()} == {"accepted": 6, "frozen": 3}
    names, *rows = list_bins(manifest, {"frozen": ("motion", ">=", 0.5)})
    assert names == ["rule", "low", "high", "clips", "threshold"] and sum(entry[3] for entry in rows) == 12
    assert rows[0][1] == 0.0 and rows[-1][2] == 11.0 and {entry[4] for entry in rows} == {0.5}


def test_consistency_by_pixels_says_so_in_its_name() -> None:
    still = np.repeat(drawn("", 1, 1), 12 * FPS, axis=0)
    found = {name: value for _, name, value in score_pooled(still, FPS)}
    assert found == {"subject_consistency@pooled-8x8": pytest.approx(1), "dinov2_10s@pooled-8x8": pytest.approx(100)}
    assert describe_metric("dinov2_10s@pooled-8x8").means.endswith("made with pooled-8x8 in the place of the metric's own network")
    assert list(score_pooled(still[:1], FPS)) == []


def test_a_number_of_videos_is_described_as_one() -> None:
    words = describe_metric("map_error_absent_videos")
    assert (words.group, words.better, words.title) == ("How many?", "", "map error absent videos")
    assert words.means == "videos in which map error absent could be measured"


def test_a_comparison_counts_and_draws_its_prompts() -> None:
    """Sharpness has no better side, motion neither; same_heading is better where it is lower."""
    first = {"a__same_heading": [1.0, 2, 3, 4], "a__sharpness": [1.0, 2, 3, 4]}
    found = results(**first, b__same_heading=[0.0, 2, 2, 8], b__sharpness=[2.0, 3, 4, 2])
    rows = {row["word"].title: row for row in compare_stages(found, {"prompts": "a"}, {"prompts": "b"})["rows"]}
    assert rows["same heading"]["found"].each == (-1, -1, 0, 4)
    assert rows["same heading"]["counts"] == "2 better, 1 same, 1 worse" and rows["sharpness"]["counts"] == "3 higher, 0 same, 1 lower"
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"/', rows["same heading"]["svg"])]
    tops = [float(top) for top in re.findall(r' y="(-?[\d.]+)"', rows["same heading"]["svg"])]
    assert heights == [2.5, 2.5, 0, 10] and tops == [0, 0, 0, -10]
    assert draw_differences([0.0, 0.0]).count("<rect") == 2


def test_failures_are_counted_by_video_and_lead_to_the_page() -> None:
    event = {"kind": "stall", "second": 1.0, "seconds": 2.0, "size": 0.0}
    rows = [row("s", 1) | event, row("s", 1) | event | {"second": 5.0}, row("s", 2) | event]
    galleries = {"prompts": {"rows": [{"id": "prompts-0", "tiles": [{"file": row("s", 2)["file"]}]}]}}
    made = list_failures(rows, [row("s", k) for k in range(4)], galleries, searched=True)
    assert made["table"][0]["kinds"] == {"stall": 2} and made["table"][0]["videos"] == 4
    assert [entry["place"] for entry in made["rows"]] == ["prompts-0", None, None]


def test_systems_beside_the_students_are_expected_with_fewer_clips() -> None:
    """Two of the project's five continuations have a memory of their own."""
    params = make_params()
    whole = count_expected(params)
    fewer = params.model_copy(update={"generate": params.generate.model_copy(update={"continued_beside": 4})})
    assert whole - count_expected(fewer) == 2 * 6
