"""Videos in VBench's own naming, and its script in another environment, for which a small script stands in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tasks.__main__ as cf
from cf_model.evaluate.cells import expand_lines
from cf_model.metrics.vbench_folder import name_videos, read_results
from tasks.params.yaml_file import Refused

LONG = "a drone view of cliffs " * 12
SCRIPT = """
import argparse, json, os, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("mode", "videos_path", "prompt_file", "output_path"):
    parser.add_argument(f"--{name}")
parser.add_argument("--dimension", nargs="+")
args = parser.parse_args()
assert args.mode == "custom_input" and "SECRET_TOKEN" not in os.environ
if "broken" in args.dimension:
    sys.exit("CUDA is not there")
videos = sorted(Path(args.videos_path).iterdir())
assert {video.name for video in videos} == set(json.load(open(args.prompt_file)))
values = {"imaging_quality": 62.5, "dynamic_degree": True, "subject_consistency": 0.9}
rows = {one: [0, [{"video_path": str(video), "video_results": values[one]} for video in videos]] for one in args.dimension}
out = Path(args.output_path)
out.mkdir()
(out / "results_1_eval_results.json").write_text(json.dumps(rows))
"""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    rows = []
    for number, prompt in enumerate(["a cat", "a cat", LONG, "on/off"]):
        (folder / f"{number}.mp4").write_bytes(b"video %d" % number)
        rows.append({"file": f"{number}.mp4", "prompt": prompt})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "VBench").mkdir()
    (tmp_path / "VBench/evaluate.py").write_text(SCRIPT)
    return folder


def run(videos: Path, *more: str) -> Path:
    out = videos.parent / "out"
    cf.main(["vbench", "--videos", str(videos), "--manifest", str(videos / "manifest.jsonl"), "--out", str(out), *more])
    return out


def worker(videos: Path, *dimensions: str) -> list[str]:
    words = ["--checkout", str(videos.parent / "VBench"), "--python", sys.executable]
    return [*words, *(word for one in dimensions for word in ("--dimension", one))]


def test_videos_are_named_by_prompt_or_by_number(videos: Path) -> None:
    out = run(videos)
    assert {file.name: file.read_bytes() for file in (out / "videos").iterdir()} == {
        "a cat-0.mp4": b"video 0",
        "a cat-1.mp4": b"video 1",
        "0001-0.mp4": b"video 2",
        "0002-0.mp4": b"video 3",
    }
    prompts = json.loads((out / "prompts.json").read_text())
    assert prompts == {"a cat-0.mp4": "a cat", "a cat-1.mp4": "a cat", "0001-0.mp4": LONG, "0002-0.mp4": "on/off"}
    with pytest.raises(Refused, match="is there already; name a new folder"):
        run(videos)


@pytest.mark.parametrize("prompt", ["a/b", "..", ".hidden", "ends ", "line\nbreak", "ä" * 130, "\x00"])
def test_prompts_that_are_no_file_names(prompt: str) -> None:
    assert name_videos([{"file": "x.mp4", "prompt": prompt}]) == {"x.mp4": ("0000-0.mp4", prompt)}


def test_prompts_that_are_absent_or_would_collide() -> None:
    with pytest.raises(ValueError, match=r"x\.mp4 has no prompt"):
        name_videos([{"file": "x.mp4"}])
    with pytest.raises(ValueError, match=r"two videos would both be called 0001-0\.mp4"):
        name_videos([{"file": "x.mp4", "prompt": "0001"}, {"file": "y.mp4", "prompt": "a/b"}])


def test_the_official_script_scores_the_folder(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    out = run(videos, *worker(videos, "imaging_quality", "dynamic_degree"))
    cells = expand_lines(map(json.loads, (out / "scores.jsonl").read_text().splitlines()), "scores")
    assert {(cell["file"], cell["metric"]): cell["value"] for cell in cells} == {
        (f"{number}.mp4", metric): value for number in range(4) for metric, value in (("imaging_quality", 0.625), ("dynamic_degree", 1.0))
    }
    assert {cell["protocol"] for cell in cells} == {"vbench/official"}


def test_a_script_that_fails_is_quoted(videos: Path) -> None:
    with pytest.raises(Refused, match=r"VBench's script ended with code 1: CUDA is not there; its folder is .*, to run it by hand"):
        run(videos, *worker(videos, "broken"))


def test_options_that_do_not_fit(videos: Path) -> None:
    with pytest.raises(Refused, match="--checkout, --python and --dimension go together"):
        run(videos, "--dimension", "imaging_quality")
    (videos.parent / "VBench/evaluate.py").unlink()
    with pytest.raises(Refused, match="must both be there"):
        run(videos, *worker(videos, "imaging_quality"))
    (videos / "3.mp4").unlink()
    with pytest.raises(Refused, match=r"3\.mp4 is not there; correct"):
        run(videos)


def test_results_of_other_videos_or_another_form_are_refused() -> None:
    names = {"x.mp4": ("a-0.mp4", "a")}
    with pytest.raises(ValueError, match=r"are of b-0\.mp4, which was not handed in"):
        read_results({"scene": [0.5, [{"video_path": "/v/b-0.mp4", "video_results": 1}]]}, names)
    with pytest.raises(ValueError, match="of scene are not a mean and a list of videos"):
        read_results({"scene": [0.5]}, names)
