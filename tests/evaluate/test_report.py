"""The report page: whole, escaped, the same bytes twice, and not put out by anything that is absent."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import pytest
from evaluate.project import EVIL, jsonl, make_params, write_mp4, write_project

from cf_model.data import worlds
from cf_model.evaluate.figures import Line, draw_chart, draw_memories, draw_strip
from cf_model.evaluate.page import describe_system, list_facts, summarise_filter
from cf_model.evaluate.report import Results, check_goals, compare_stages, format_number, state_verdict
from cf_model.evaluate.statistics import Interval, without_interval
from cf_model.model.view import TeacherView
from tasks.report import run


class Page(HTMLParser):
    """Tags and their attributes; the text of everything."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], str, dict[str, float]]:
    paths = write_project(tmp_path_factory.mktemp("project"), make_params())
    metrics = run(make_params(), cast(Any, SimpleNamespace()), **paths)
    return paths, (paths["out"] / "report.html").read_text(), metrics


def test_captions_stay_text(made: tuple[Any, str, Any]) -> None:
    page = Page(made[1])
    assert EVIL not in made[1]
    assert "alert(" in page.text  # it is shown, and as text
    assert [attrs.get("src") for tag, attrs in page.tags if tag == "script"] == [None, "../runtime/runtime.js", None]


def test_needs_no_other_file(made: tuple[Any, str, Any]) -> None:
    page = Page(made[1])
    addresses = [attrs[name] or "" for tag, attrs in page.tags for name in ("src", "href") if name in attrs and tag != "a"]
    assert all(a.startswith("data:") or a == "../runtime/runtime.js" or re.fullmatch(r"#\w+", a) for a in addresses)
    assert not re.search(r"url\((?!#)|@import", made[1])
    assert len(made[1]) < 12e6


def test_shows_cases_by_rule_and_all_systems(made: tuple[Any, str, Any]) -> None:
    _, html, metrics = made
    assert metrics["videos"] == 8 * 5 + 8 + 4 * 6  # prompts x systems, blind guess, continuations x systems; real is one of them
    assert metrics["strips"] == 4 * 5 + 4 * 6
    said = Page(html).text
    assert said.count("among the worst of stage2") == 3 + 2 and said.count("among the most changed from stage1 to stage2") == 3 + 2
    assert said.index("among the worst") < said.index("among the most changed") < said.index("among the first of samples")
    numbers = re.findall(r"<small>(\d{5}), seed 0", html)
    assert len(numbers) == 8 + 4 and len(set(numbers[:8])) == 8, "no prompt is shown twice"


def test_blind_guess_holds_the_right_answer_and_different_captions(made: tuple[Any, str, Any]) -> None:
    cards = re.findall(r'data-answer="(\d)">.*?</div></div>', made[1], flags=re.DOTALL)
    asked = re.findall(r'<div class="choices">(.*?)</div>', made[1])
    assert len(cards) == len(asked) == 8
    assert len(set(cards)) > 1
    for answer, choices in zip(cards, asked, strict=True):
        offered = re.findall(r'<button type="button">(.*?)</button>', choices)
        assert len(offered) == len(set(offered)) == 4 and int(answer) < 4


def test_says_what_was_planted_and_caught(made: tuple[Any, str, Any]) -> None:
    text = " ".join(Page(made[1]).text.split())
    assert "3 of 6 clips were kept" in text
    assert "all of them were caught" in text and "no good one was lost" in text
    assert "seconds > 10.0" in text


def test_calls_no_clip_of_a_user_lost_because_nobody_planted_any() -> None:
    manifest = [{"id": "a", "kept": True, "split": "train"}, {"id": "b", "kept": False, "split": "", "reason": "too_short"}]
    assert not summarise_filter(manifest, [{"id": "a", "planted": None}, {"id": "b", "planted": None}])["known"]
    assert summarise_filter(manifest, [{"id": "a", "planted": None}, {"id": "b", "planted": "short"}])["known"]


def test_says_where_the_numbers_come_from_and_what_stands_in_for_another(made: tuple[Any, str, Any]) -> None:
    text = " ".join(Page(made[1]).text.split())
    assert "Substituted: dinov2_10s@pooled-8x8" in text and "SHA-256 of their sorted lines" in text
    assert "180 of 130" in text, "the made-up project continues each clip with two seeds"
    assert "Infinity-RoPE" in text and "arXiv 2602.06028v1, Table 1, p. 8" in text
    assert "4 of 4 failures" in text and "git checkout COMMIT" in text
    assert len(re.findall(r'<img alt="three frames of clip-0000', made[1])) > 5 and "no picture" in text


def test_tables_for_dvc_plots(made: tuple[dict[str, Path], str, Any]) -> None:
    rules, plane = ((made[0]["out"] / name).read_text().splitlines() for name in ("rules.csv", "plane.csv"))
    assert rules[0] == "rule,low,high,clips,threshold" and {line.split(",")[0] for line in rules[1:]} == {"too_short", "frozen"}
    assert plane[0].startswith("suite,system,drift,") and [line.split(",")[1] for line in plane[1:]][-1] == "real" and len(plane) == 6


def test_nothing_of_the_run_itself_is_in_the_page(made: tuple[Any, str, Any]) -> None:
    html = made[1]
    assert "a_stale_number" not in html and "a stale number" not in html
    assert str(made[0]["results"].parent) not in html
    assert not re.search(r"20\d\d-\d\d-\d\d", html)


def test_unique_ids(made: tuple[Any, str, Any]) -> None:
    ids = [attrs["id"] for tag, attrs in Page(made[1]).tags if "id" in attrs and tag not in ("path", "clippath", "g", "use", "rect")]
    assert len(ids) == len(set(ids))


def test_same_bytes_in_another_process(made: tuple[dict[str, Path], str, Any], tmp_path: Path) -> None:
    paths = {name: str(path) for name, path in (made[0] | {"out": tmp_path / "again"}).items()}
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1]), *sys.path]!r}
from pathlib import Path
from evaluate.project import make_params
from tasks.report import run
run(make_params(), None, **{{name: Path(path) for name, path in {paths!r}.items()}})
"""
    elsewhere = {**os.environ, "PYTHONHASHSEED": "4711", "TZ": "Asia/Tokyo", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=elsewhere)
    assert (Path(paths["out"]) / "report.html").read_bytes() == (made[0]["out"] / "report.html").read_bytes()


def test_empty_project_is_a_page_that_says_so(tmp_path: Path) -> None:
    names = ("results", "samples", "metrics", "models", "data", "out")
    metrics = run(make_params("smoke", "folder"), cast(Any, None), **{name: tmp_path / name for name in names})
    text = Page((tmp_path / "out/report.html").read_text()).text
    assert metrics["videos"] == 0
    assert text.count("absent") > 10
    assert "no oracle metrics" in text and "Smoke shows that everything runs" in text


def test_half_a_project(tmp_path: Path) -> None:
    """Two prompts, no continuations, one system without its video file, no oracle metric, one seed."""
    paths = write_project(tmp_path, make_params("smoke"), prompts=2)
    index = [json.loads(line) for line in (paths["samples"] / "index.jsonl").read_text().splitlines()]
    index = [row for row in index if row["suite"] == "prompts" and row["seed"] == 0 and (row["system"], row["file"][-8]) != ("stage1", "1")]
    (paths["samples"] / index[0]["file"]).unlink()
    jsonl(paths["samples"] / "index.jsonl", index)
    for file in ("cells.jsonl", "curves.csv"):
        (paths["results"] / file).unlink()
    (paths["metrics"] / "evaluate.json").write_text(json.dumps({"prompts": {"stage2": {"motion": 1.25}}, "clips": 3}))
    run(make_params("smoke"), cast(Any, None), **(paths | {"clips": None}))
    text = Page((paths["out"] / "report.html").read_text()).text
    assert "file absent" in text and "No metric against time" in text
    assert "1.25" in text


def test_a_context_that_the_teacher_was_not_trained_on_is_said(made: tuple[Any, str, Any]) -> None:
    said = dict(list_facts(make_params(shown="contiguous"), [], [], []))
    assert said["context shown to the teacher"] == "contiguous, though it was trained on memory (stage2.teacher.mismatch: accept)"
    assert "context shown to the teacher" not in dict(list_facts(make_params(), [], [], [])) and "though it was trained on" not in made[1]


def test_videos_too_large_for_a_page_are_left_out(tmp_path: Path) -> None:
    paths = write_project(tmp_path, make_params(), prompts=1)
    for file in paths["samples"].rglob("*.mp4"):
        file.write_bytes(bytes(5_000_000))
    metrics = run(make_params(), cast(Any, None), **paths)
    assert metrics["videos"] == 0
    assert "too large for one page" in (paths["out"] / "report.html").read_text()


def results(**values: float) -> Results:
    """By `suite__system__metric`, system level only."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in values.items():
        suite, name, metric = key.split("__")
        means.setdefault(suite, {}).setdefault(name, {})[metric] = value
    return Results({}, means, resamples=10, seed=0)


def test_goals_are_held_missed_or_absent() -> None:
    found = results(
        prompts__base__compass_coherence=0.95,
        prompts__base__sky_accuracy=0.9,
        prompts__real__compass_coherence=1.0,
        prompts__real__sky_accuracy=1.0,
        prompts__causal_init__sprite_recall=0.8,
        prompts__stage1__sprite_recall=0.96,
        continuations__t__map_error=28.0,
        continuations__f__map_error=45.0,
    )
    rows = check_goals(found, {name: name for name in ("base", "causal_init", "stage1")}, {"slow-fast": "t", "fast only": "f"})
    assert [row["held"] for row in rows] == [True, False, None, True, None, True]


def test_a_hollow_win_is_named() -> None:
    found = results(
        prompts__a__memory_ratio=0.74,
        prompts__b__memory_ratio=0.55,
        prompts__a__diversity=47.0,
        prompts__b__diversity=20.0,
        prompts__a__motion=5.0,
        prompts__b__motion=5.0,
    )
    made = compare_stages(found, {"prompts": "a"}, {"prompts": "b"})
    assert made["fell"] == ["diversity (47.0 to 20.0)"]
    assert set(made["missing"]) == {"heading perplexity", "headings covered"}


def test_verdict_needs_an_interval_clear_of_zero() -> None:
    assert state_verdict(Interval(-1, -2, -0.5), "down") == "better"
    assert state_verdict(Interval(-1, -2, -0.5), "up") == "worse"
    assert state_verdict(Interval(-1, -2, 0.5), "up") == "no clear difference"
    assert state_verdict(without_interval(-1), "up") == "no interval"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (1234, "1 234"), (-0.25, "−0.250"), (12.345, "12.3"), (1e-5, "1e−05"), (None, "–"), (float("nan"), "–")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_figures_are_fragments_that_follow_the_theme() -> None:
    svg = draw_chart([Line("#ff0000", [0, 1, 2], [1, 10, 100], [0.5, 5, 50], [2, 20, 200])], x="seconds", log=True)
    assert svg.startswith("<svg") and "currentColor" in svg and "<metadata" not in svg and "width=" not in svg.split(">")[0]


def test_strip_is_a_png_of_frames_side_by_side() -> None:
    address = draw_strip(np.zeros((3, 32, 64, 3), np.uint8), 64)
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (3 * 128, 64)


def test_the_page_begins_with_the_worlds_as_they_are_remembered(tmp_path: Path) -> None:
    """Rows of the first three known worlds of which every system has a video, the prefix apart from what comes after it."""
    world = worlds.draw_world(3)
    video = worlds.render_clip(world, 65, height=32, width=32, fps=16)
    index = []
    for number in range(4):
        for system in ("t", "s"):
            file = f"continuations/{system}/{number:05d}-s0.mp4"
            write_mp4(tmp_path / file, video)
            row = {"suite": "continuations", "system": system, "prompt": world.caption, "clip": f"c{number}", "seed": 0, "file": file}
            index.append(row | {"prefix_frames": 33})
    truths = {f"c{number}": world.truth(65, 16.0) if number != 1 else None for number in range(4)}
    drawn = draw_memories(index, {"teacher": "t", "stage 2": "s"}, truths, tmp_path)
    assert [one["number"] for one in drawn] == ["00000", "00002", "00003"]
    assert [row["title"] for row in drawn[0]["rows"]] == ["the world", "seen before", "teacher", "stage 2"]
    assert all(row["source"].startswith("data:image/png") for row in drawn[0]["rows"])
    assert drawn[0]["rows"][1]["source"] != drawn[0]["rows"][2]["source"] == drawn[0]["rows"][3]["source"]


def test_every_kind_of_past_is_described() -> None:
    system = next(one for one in make_params().generate.continuations.values() if one.view)
    assert system.view
    for context in get_args(get_type_hints(TeacherView)["context"]):
        words = describe_system(system.model_copy(update={"view": replace(system.view, context=context)}))
        assert words.startswith(f"{system.weights}, bidirectional, sees of the past: "), context
