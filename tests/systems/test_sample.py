"""`cf sample`: prompts from published files, subsets, costs, and a folder that goes on where it stopped and `cf score` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tasks.__main__ as cf
from cf_model.evaluate.cells import expand_lines
from cf_model.systems import adapters, sampling
from tasks.params.yaml_file import Refused

MODEL = '{"_class_name": "ContextForcingPipeline"}'


class Scrolls:
    """A system that makes scrolling noise, and ends the program at a video of our choice."""

    fps = 8

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.ends_at = -1

    def count_frames(self, seconds: float) -> int:
        return round(seconds * self.fps)

    def describe(self) -> dict[str, Any]:
        return {"pipeline": "Scrolls"}

    def make_video(self, prompt: str, *, seconds: float, seed: int, image: Path | None = None) -> np.ndarray:
        if len(self.made) == self.ends_at:
            raise KeyboardInterrupt
        self.made.append((prompt, seed))
        picture = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)
        return np.stack([np.roll(picture, k, axis=1) for k in range(self.count_frames(seconds))])


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Scrolls:
    one = Scrolls()
    monkeypatch.setattr(adapters, "open_system", lambda *_: one)
    return one


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options of a run with a model folder of ours and forty prompts."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(MODEL)
    (tmp_path / "model/context_forcing.json").write_text('{"fps": 8}')
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(40)))
    paths = {"weights": "model", "prompts": "prompts.txt", "out": "out"}
    return ["--system", "mine", "--seconds", "1", *(word for key, name in paths.items() for word in (f"--{key}", str(tmp_path / name)))]


def run(*words: str) -> None:
    cf.main(["sample", *words])


def test_a_subset_is_made_and_scored(system: Scrolls, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*words, "--subset", "nightly", "--dry-run")
    assert capsys.readouterr().out == "16 videos of 16 prompts, 8 frames each, 128 in all: hours not known before the first video\n"
    assert not (tmp_path / "out").exists()
    run(*words)
    said = capsys.readouterr().out
    assert said.startswith("2 videos of 2 prompts, 8 frames each, 16 in all") and "(measured on the first video)" in said
    assert len(system.made) == 2 and said.endswith("manifest.jsonl: 2 videos, 2 of them new\n")
    out, scores = tmp_path / "out", tmp_path / "scores.jsonl"
    inputs = ("--videos", out, "--manifest", out / "manifest.jsonl", "--prompts", out / "prompts.json", "--out", scores)
    cf.main(["score", *map(str, inputs), "--protocol", "vbench"])
    cells = expand_lines(map(json.loads, scores.read_text().splitlines()), "x")
    assert {(cell["system"], cell["prompt_id"], cell["prompt"]) for cell in cells} == {
        ("mine", f"{int(prompt.split()[1]) + 1:05d}", prompt) for prompt, _ in system.made
    }


def test_an_interrupted_run_goes_on(system: Scrolls, words: list[str], tmp_path: Path) -> None:
    system.ends_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    manifest = tmp_path / "out/manifest.jsonl"
    manifest.write_text(manifest.read_text() + '{"file": "00')  # as a kill leaves it
    system.ends_at = -1
    run(*words)
    assert len(system.made) == 2 and len(manifest.read_text().splitlines()) == 2
    (tmp_path / "out" / json.loads(manifest.read_text().splitlines()[0])["file"]).unlink()
    run(*words)
    assert len(system.made) == 3 and system.made[2] == system.made[0] and len(manifest.read_text().splitlines()) == 2
    with pytest.raises(Refused, match=r"out was begun with another crf, see .*settings\.json; use the same, or name another --out"):
        run(*words, "--crf", "30")
    assert len(system.made) == 3


def test_subsets_are_parts_of_larger_ones() -> None:
    prompts = sampling.PromptSet({str(n): f"p{n}" for n in range(300)}, {str(n): f"long {n}" for n in range(300)}, whole=False)
    sets = {name: sampling.list_tasks(prompts, name) for name in ("smoke", "nightly", "paper", "all")}
    assert [len(tasks) for tasks in sets.values()] == [2, 16, 500, 1500]
    ids = [{task.prompt_id for task in tasks} for tasks in sets.values()]
    assert ids[0] < ids[1] < ids[2] < ids[3] and len(ids[2]) == 100
    assert sets["smoke"][0].text == sets["smoke"][0].prompt.replace("p", "long ") and sets["paper"][4].seed == 4


def test_vbenchs_list_is_read_as_its_repository_has_it(tmp_path: Path) -> None:
    file, longer = tmp_path / "VBench_full_info.json", tmp_path / "all_dimension_extended.txt"
    file.write_text(json.dumps([{"prompt_en": f"short {n}", "dimension": ["color"]} for n in range(946)]))
    longer.write_text("".join(f"written out {n}\n" for n in range(946)))
    tasks = sampling.list_tasks(sampling.read_prompts(file, longer), "paper")
    assert len(tasks) == 946 * 5 and tasks[5] == ("00002", "short 1", "written out 1", 0) and tasks[5].file == "00002-s0.mp4"
    longer.write_text("one\n")
    with pytest.raises(ValueError, match=r"extended\.txt holds 1 prompts and .*VBench_full_info\.json 946; they must be the same"):
        sampling.read_prompts(file, longer)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "is neither VBench's list of prompts nor an object"), ('[{"x": 1}]', "is neither VBench's list"), ("{}", "holds no prompt"),
     ('{"a/b": "x"}', r"the prompt 'a/b' is no text, or its id can't be"), ('{"a": 1}', "the prompt 'a' is no text")],
)  # fmt: skip
def test_prompts_of_another_form_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        sampling.read_prompts(tmp_path / "p.json", None)


def test_costs_are_said_before_anything_is_made(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling.find_rate("magi-1") == 0.19 and sampling.find_rate("mine") is None
    run(*words, "--rate", "4", "--subset", "all", "--dry-run")
    assert capsys.readouterr().out == "200 videos of 40 prompts, 8 frames each, 1600 in all: 0.11 GPU hours at 4 frames a second (--rate)\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--system", "wan2.1", "--seconds", "60"), r"--seconds is 60, and wan2\.1 is made for 5\.1 s at most"),
        (("--seconds", "0"), "--seconds is 0 and --rate None; both are above 0"),
        (("--system", "framepack-f1"), r"framepack-f1 begins from a picture; name a folder of PROMPT_ID\.png by --first-frames"),
        (("--first-frames", "."), "--first-frames is for systems that begin from a picture, and mine does not"),
        (("--weights", "nowhere"), "--weights nowhere is no folder; name one that holds a model of this project"),
        (("--set", "steps"), "--set steps has no =; write KEY=VALUE"),
        (("--prompts", "nowhere.txt"), r"nowhere\.txt is not there; name a file"),
    ],
)
def test_options_that_do_not_fit(more: tuple[str, ...], sentence: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=sentence):
        run(*words, *more)
    assert not (tmp_path / "out").exists()


def test_a_missing_first_frame_and_a_strange_folder_are_refused(words: list[str], system: Scrolls, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    with pytest.raises(Refused, match=r"frames has no 000\d\d\.png; 2 of 2 prompts lack their first frame"):
        run(*words, "--system", "framepack-f1", "--first-frames", str(tmp_path / "frames"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(Refused, match="is already there and not from an earlier run of this command"):
        run(*words)
    assert sampling.parse_settings(["a=1", "b=x", "c=true"]) == {"a": 1, "b": "x", "c": True}
