"""`cf compare`: the page's numbers against the numbers it was given; runs by folder, revision and experiment."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate.project import EVIL, make_params, write_project

from cf_model.evaluate import run_comparison
from cf_model.evaluate.report import Results
from cf_model.evaluate.run_comparison import compare_metric
from tasks.commands import compare as page
from tasks.files.json_lines import read_json_lines
from tasks.params.yaml_file import Refused
from tasks.report import read_curves, read_metrics, read_results, read_training

PARAMS = "profile: tiny\nseed: 7\nvideo: {height: 32, width: 32, fps: 16}\nevaluate: {resamples: 200}\nstage2: {steps: 10, note: 'NOTE'}\n"


def write(root: Path, *, note: str = "a", prompts: int = 6) -> Path:
    """A run's folder with made-up results; the same numbers every time."""
    write_project(root, make_params(), prompts=prompts, seconds=2)
    (root / "params.yaml").write_text(PARAMS.replace("NOTE", note))
    return root


def read(root: Path) -> Results:
    return read_results(root / "results", root / "metrics", resamples=200, seed=7)


def edit_cells(root: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = root / "results/cells.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs: in B, stage 2's sharpness is 0.5 higher in each video, its compass coherence 0.2, and nothing else differs."""
    a = write(tmp_path_factory.mktemp("runs") / "one")
    b = a.with_name("other & <b>")
    shutil.copytree(a, b)

    def better(row: dict[str, object]) -> None:
        step = {"sharpness": 0.5, "compass_coherence": 0.2}.get(str(row["metric"]), 0)
        if row["system"] == "stage2" and row["suite"] == "prompts":
            row["value"] = float(row["value"]) + step  # type: ignore[arg-type]

    edit_cells(b, better)
    (b / "params.yaml").write_text(PARAMS.replace("NOTE", EVIL.replace("'", "")).replace("steps: 10", "steps: 20"))
    curve = b / "models/stage2/metrics.jsonl"
    curve.write_text(curve.read_text().replace('"step": 7}', '"step": 7, "new_value": 1.0}'))
    return a, b


@pytest.fixture(scope="module")
def html(pair: tuple[Path, Path]) -> str:
    out = pair[0].with_name("out") / "compare.html"
    page.main([str(pair[0]), str(pair[1]), "--out", str(out)])
    return out.read_text()


def text(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)))


def test_differences_and_intervals(pair: tuple[Path, Path]) -> None:
    a, b = (read(root) for root in pair)
    (prompts, _) = run_comparison.compare_suites(a, b)
    rows = {(one["name"], row["metric"]): row for one in prompts["systems"] for row in one["rows"]}
    sharp = rows["stage2", "sharpness"]
    assert sharp["found"].change.mean == pytest.approx(0.5) and sharp["found"].change.low == pytest.approx(0.5)
    assert sharp["pairs"] == 12 and sharp["says"] == "higher", "≈: neither higher nor lower is better"
    assert rows["stage2", "compass_coherence"]["says"] == "better"
    assert sharp["found"].prompts == 6 and sharp["found"].effect is None, "all differences are equal, so they have no deviation"
    assert sharp["p_family"] == pytest.approx(2 * sharp["found"].p), "two tests on the page, corrected by Holm"
    assert np.isnan(rows["stage1", "sharpness"]["p_family"]), "what is the same was not tested"
    assert rows["stage1", "sharpness"]["says"] == "the same" and rows["stage2", "diversity"]["says"] == "the same"
    assert [one["name"] for one in prompts["systems"] if not one["same"]] == ["stage2"]
    back = run_comparison.compare_suites(b, a)[0]["systems"]
    (worse,) = [row for one in back for row in one["rows"] if row["metric"] == "compass_coherence" and not row["same"]]
    assert worse["says"] == "worse" and worse["found"].change.mean == pytest.approx(-0.2)
    tally = run_comparison.count_verdicts(run_comparison.compare_suites(a, b))
    assert tally["says"]["better"] == 1 and tally["says"]["higher"] == 1 and tally["tested"] == 2 and tally["by_chance"] == 0.1


def test_only_videos_of_both_are_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Other prompts in B: no pair, so no interval and no claim."""
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    edit_cells(other, lambda row: row.update(prompt="another"))
    found = run_comparison.compare_suites(read(pair[0]), read(other))
    rows = [row for suite in found for one in suite["systems"] for row in one["rows"] if row["metric"] == "sharpness"]
    assert rows and all(row["pairs"] == 0 and row["says"] in ("no interval", "the same") for row in rows)


def test_five_prompts_are_too_few(pair: tuple[Path, Path]) -> None:
    a, b = (read(root) for root in pair)
    place = ("prompts", "stage2", "sharpness")
    short = {key: value for key, value in a.cells[place].items() if not key[0].startswith("00000 ")}
    row = compare_metric(replace(a, cells={place: short}), b, *place)
    assert row is not None and row["pairs"] == 10 and row["says"] == "too few prompts" and not row["clear"]


def test_the_page_says_what_differs(html: str) -> None:
    said = text(html)
    assert "stage2.steps 10 20" in said and "seed 7" not in said
    assert re.search(r"1 better in B 0 worse in B", said)
    assert "Exactly the same in both: base, causal_init, stage1." in said
    assert "Step for step the same in both: base, stage1." in said and "new value" not in said, "one row is no curve"
    # videos of stage 2 in A and B for each of the first four prompts, and what is real
    assert html.count("data:video/mp4") == 4 * 3 and html.count("data:image/png") == 4 * 2


def test_what_the_runs_say_is_escaped(html: str) -> None:
    assert 'alert("x")' not in html and "&lt;script&gt;alert" in html
    assert "other &amp; &lt;b&gt;" in html and "other & <b>" not in html
    assert html.count("<script>") == 1


def test_the_page_needs_no_other_file(html: str) -> None:
    places = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert places and all(place.startswith(("data:", "#")) for place in places)
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_two_equal_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page.main([str(pair[0]), str(pair[0]), "--out", str(tmp_path / "same.html")])
    said = text((tmp_path / "same.html").read_text())
    assert "None: the two were made with the same values." in said and "None differs." in said and "0 better in B 0 worse in B" in said


def test_other_protocols_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sides = []
    for gap in (2, 5):
        sides.append(tmp_path / f"gap{gap}")
        shutil.copytree(pair[0], sides[-1])
        edit_cells(sides[-1], lambda row, gap=gap: row.update(protocol=f"world/1,gap={gap}"))  # type: ignore[misc]
    with pytest.raises(
        Refused, match=r"measured by protocol world/1,gap=2 in A and by world/1,gap=5 in B, so the numbers can't be compared"
    ):
        page.main([str(sides[0]), str(sides[1]), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()
    page.main([str(pair[0]), str(sides[0]), "--out", str(tmp_path / "page.html")])  # cells from before protocols were stated


def test_what_is_absent_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "params.yaml").write_text("profile: tiny\n")
    page.main([str(pair[0]), str(empty), "--out", str(tmp_path / "page.html")])
    said = text((tmp_path / "page.html").read_text())
    assert "No number is in both" in said and "No video is shown" in said and "Neither run has a dvc.lock" in said


def test_params_and_stages() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "tracking": {"wandb": "off"}}
    other = {"a": {"b": 2.0, "c": [1, 2], "d": None}, "tracking": {"wandb": "offline"}}
    assert page.list_changed_params(one, other) == [("a.b", "1", "2.0"), ("a.d", "–", "null")]
    deps = [{"path": "cf_model/x.py", "md5": "1"}, {"path": "data/latents", "md5": "1"}]
    before = {"base": {"deps": deps, "outs": [{"path": "models/base", "md5": "1"}], "params": {"params.yaml": {"base": {"steps": 1}}}}}
    after = json.loads(json.dumps(before).replace('x.py", "md5": "1"', 'x.py", "md5": "2"').replace('"steps": 1', '"steps": 2'))
    assert page.compare_stages(before, after)[0]["same"] is True, "other code and parameters, the same outs"
    after["base"]["outs"][0]["md5"] = "2"
    (row,) = page.compare_stages(before, after)
    assert row == {"stage": "base", "same": False, "code": ["cf_model/x.py"], "data": [], "params": ["base.steps"]}
    assert page.compare_stages(before, {})[0]["absent"] == "B"
    after["base"]["params"]["params.yaml"] = {"base": {"steps": 1}, "tracking": {"wandb": "online"}}
    assert page.compare_stages(before, after)[0]["params"] == [], "what is told to W&B makes no other bytes"


def test_numbers_of_a_stage_are_b_minus_a(tmp_path: Path) -> None:
    for letter, value in (("A", 1), ("B", 3)):
        file = tmp_path / letter / "metrics/base.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"loss": value, "same": 5, "word": letter}))
    loss, word = run_comparison.compare_stage_metrics(*(read_metrics(tmp_path / letter / "metrics") for letter in "AB"))
    assert (loss["a"], loss["b"], loss["change"]) == (1, 3, 2) and word["change"] is None


@pytest.mark.parametrize("name", ["metrics/base.json", "metrics/evaluate.json", "results/cells.jsonl"])
@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_a_damaged_file_is_named(name: str, damaged: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "B")
    (tmp_path / "B" / name).write_text(damaged)
    with pytest.raises(Refused, match=rf"B/{name} is damaged: "):
        page.main([str(pair[0]), str(tmp_path / "B"), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def height(svg: str, letter: str) -> float:
    """Where the line of a run begins; SVG counts from the top."""
    (first,) = re.findall(rf'<path d="M [\d.]+ ([\d.]+)[^"]*"[^>]*stroke: {run_comparison.COLOURS[letter]}', svg)
    return -float(first)


def test_a_ratio_of_means_is_paired_over_the_prompts(tmp_path: Path) -> None:
    """memory_ratio is no cell: both runs' distances of the same prompts give its interval."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for root, factor in zip(folders, (1.0, 0.5), strict=True):
        (root / "results").mkdir(parents=True)
        about = {"suite": "prompts", "system": "stage2", "clip": None, "seed": 0, "protocol": "p"}
        rows = [about | {"prompt": f"{k}", "file": f"{k}"} for k in range(8)]
        cells = [row | {"metric": "same_heading", "value": factor * (1 + k % 3)} for k, row in enumerate(rows)]
        cells += [row | {"metric": "other_heading", "value": 4.0} for row in rows]
        (root / "results/cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
        (root / "metrics").mkdir()
        means = {"prompts": {"stage2": {"memory_ratio": factor * 1.875 / 4}}}
        (root / "metrics/evaluate.json").write_text(json.dumps(means))
        (root / "params.yaml").write_text(PARAMS)
    page.main([*map(str, folders), "--out", str(tmp_path / "new/numbers.json")])
    found = {row["metric"]: row for row in json.loads((tmp_path / "new/numbers.json").read_text())["rows"]}
    ratio = found["memory_ratio"]
    assert (ratio["a"], ratio["b"]) == (pytest.approx(1.875 / 4), pytest.approx(1.875 / 8)) and ratio["pairs"] == ratio["prompts"] == 8
    assert ratio["difference"] == pytest.approx(-1.875 / 8) and ratio["says"] == "better"
    assert ratio["low"] < ratio["difference"] < ratio["high"] < 0
    same = found["other_heading"]
    assert (same["difference"], same["says"], same["p_family"]) == (0.0, "the same", None)


def test_each_curve_has_the_colour_of_its_run(tmp_path: Path) -> None:
    for letter, value in (("A", 1), ("B", 3)):
        for folder in ("results", "models/base"):
            (tmp_path / letter / folder).mkdir(parents=True)
        row = f"prompts,stage1,sharpness,{{}},{value},{value},{value}\n"
        (tmp_path / letter / "results/curves.csv").write_text("suite,system,metric,second,mean,low,high\n" + row.format(0) + row.format(1))
        rows = [json.dumps({"step": step, "loss": value}) + "\n" for step in range(4)]
        (tmp_path / letter / "models/base/metrics.jsonl").write_text("".join(rows))
    (system,) = run_comparison.draw_curves(*(read_curves(tmp_path / letter / "results/curves.csv") for letter in "AB"))
    (stage,) = run_comparison.draw_training(*(read_training(tmp_path / letter / "models") for letter in "AB"))["stages"]
    for charts in (system["charts"], stage["charts"]):
        (svg,) = [one["svg"] for one in charts]
        assert height(svg, "A") < height(svg, "B")


def test_videos_of_other_seeds_are_no_pair(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "B")
    index = tmp_path / "B/samples/index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps(row | {"seed": row["seed"] + 100}) + "\n" for row in rows))
    measured = run_comparison.compare_suites(*(read(root) for root in pair))

    def embedded(*roots: Path) -> list[dict[str, Any]]:
        folders = [root / "samples" for root in roots]
        indices = [read_json_lines(folder / "index.jsonl") for folder in folders]
        return run_comparison.embed_videos(indices, folders[0], folders[1], measured, 16)

    assert embedded(*pair) and embedded(pair[0], tmp_path / "B") == []


def test_running_means_are_means() -> None:
    rows = [{"step": k, "loss": float(k % 2)} for k in range(40)] + [{"step": 40, "loss": None}]
    line = run_comparison.draw_running_mean("red", rows, "loss")
    assert line is not None and set(np.round(line.y, 6)) == {0.5} and line.x[0] == 1
    assert run_comparison.draw_running_mean("red", rows[:1], "loss") is None
