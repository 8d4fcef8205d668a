"""`cf score` and `cf fetch-weights`: what a person types, what is written, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tasks.__main__ as cf
from cf_model import scoring
from cf_model.data.video import write_video
from cf_model.evaluate.cells import expand_lines
from cf_model.metrics import encoders, protocols
from tasks.commands import score
from tasks.params.yaml_file import Refused
from tests.metrics.small_networks import write_networks
from tests.metrics.test_measures import scrolling
from tests.once import made_once


def write_folder(folder: Path) -> None:
    """Videos that scroll, stand still, end early, have one frame, and are none."""
    folder.mkdir(parents=True)
    write_video(folder / "scrolls.mp4", scrolling(40, 4), fps=8, crf=18)
    write_video(folder / "still.mp4", scrolling(40, 0), fps=8, crf=18)
    write_video(folder / "one.mp4", scrolling(1), fps=8, crf=18)
    whole = (folder / "scrolls.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")


@pytest.fixture
def folder() -> Path:
    return made_once("videos-to-score", write_folder)


def run(*words: str | Path) -> list[dict[str, Any]]:
    """Run `cf evaluate --videos`, and return the lines that it wrote."""
    cf.main(["evaluate", *map(str, words)])
    out = Path(words[words.index("--out") + 1])
    assert not list(out.parent.glob("*.begun*")), "nothing half-done is left"
    return read(out)


def read(out: Path) -> list[dict[str, Any]]:
    return expand_lines(map(json.loads, out.read_text().splitlines()), str(out))


def manifest(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pick(cells: list[dict[str, Any]], video: str) -> dict[tuple[str, str], float]:
    return {(cell["protocol"], cell["metric"]): cell["value"] for cell in cells if cell["file"] == video}


def test_a_folder_without_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = run("--videos", folder, "--out", tmp_path / "scores.jsonl", "--chunk", "3", "--window", "4", "--judge", "heuristic")
    still, scrolls = pick(cells, "still.mp4"), pick(cells, "scrolls.mp4")
    assert still["vbench", "subject_consistency@pooled-8x8"] > 0.999 > scrolls["vbench", "subject_consistency@pooled-8x8"]
    assert (still["vbench", "dynamic_degree@ffmpeg-epzs"], scrolls["vbench", "dynamic_degree@ffmpeg-epzs"]) == (0, 1)
    assert {protocol for protocol, _ in still} == {
        "vbench",
        "vbench-long/upstream@45e79ec",
        "vbench-long/fixed",
        protocols.COMPETITION,
        "own",
    }
    assert still["own", "visual_stability@heuristic"] == 100 and scrolls["own", "seam_ratio"] == pytest.approx(1, abs=0.3)
    assert all(name.endswith(("@ffmpeg-epzs", "@heuristic")) or "@" not in name for protocol, name in still if protocol == "own")
    failed = {cell["file"]: cell["failed"] for cell in cells if cell["metric"] is None}
    assert set(failed) == {"one.mp4", "cut.mp4", "text.mp4"}
    assert failed["one.mp4"] == "one.mp4 has a single frame at 8 fps; scores compare frames, give a video of at least 2"
    assert failed["text.mp4"] == "text.mp4 is not a video, or has lost its header; replace it"
    said = capsys.readouterr().out
    assert "vbench/total: 3 of the videos could not be scored; mend or remove them" in said and "not scored: cut.mp4" in said
    assert f"{len(cells)} cells of 5 videos, 3 not scored" in said
    assert re.search(r"vbench +subject_consistency@pooled-8x8 .* n = 2 of 2 prompts", said)


def test_weights_prompts_and_recorded_ratings(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = made_once("small-metric-networks", write_networks)
    rows = [{"file": "still.mp4", "prompt_id": "cat", "fps": 8, "seed": 3}, {"file": "scrolls.mp4", "prompt": "a red boat"}]
    listed = manifest(tmp_path / "manifest.jsonl", *rows)
    (tmp_path / "prompts.json").write_text('{"cat": "a cat"}')
    (tmp_path / "answers.json").write_text('{"still.mp4": "Score: 4", "scrolls.mp4": "hm"}')
    cells = run(
        "--videos", folder, "--manifest", listed, "--prompts", tmp_path / "prompts.json", "--weights", weights,
        "--judge", tmp_path / "answers.json", "--out", tmp_path / "scores.jsonl",
    )  # fmt: skip
    still = pick(cells, "still.mp4")
    assert still["vbench", "subject_consistency@dino"] > 0.999 and still["vbench-long/fixed", "subject_consistency@dino@dinov2-fast"] > 0.9
    assert -1 <= still[protocols.COMPETITION, "clip_score@clip"] <= 1 and still["own", "visual_stability@replay-answers"] == 80
    row = next(cell for cell in cells if cell["file"] == "still.mp4")
    assert (row["prompt_id"], row["seed"], row["fps"], row["frames"]) == ("cat", 3, 8, 40) and row["weights"]["subject"].startswith(
        "sha256:"
    )
    judged = next(cell for cell in cells if cell["file"] == "scrolls.mp4" and cell["metric"].startswith("visual_stability"))
    assert judged["value"] is None and "holds no score from 0 to 5" in judged["failed"] and judged["answers"] == ["hm"]
    said = capsys.readouterr().out
    assert "vbench/total: VBench's total needs 16 dimensions and lacks subject_consistency" in said
    assert "visual_stability@replay-answers: ratings 0 x 0, 1 x 0, 2 x 0, 3 x 0, 4 x 1, 5 x 0; answers without a rating: 1\n" in said


def test_an_interrupted_scoring_goes_on_and_a_second_scores_only_what_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "scores.jsonl"
    videos.mkdir()
    for name in ("scrolls", "still"):
        shutil.copyfile(folder / f"{name}.mp4", videos / f"{name}.mp4")
    scored: list[str] = []
    real = scoring.decode_trace

    def decode_trace(reader: Any, path: Path, *rest: Any) -> Any:
        scored.append(path.name)
        if path.name == "still.mp4" and len(scored) == 2:
            raise KeyboardInterrupt
        return real(reader, path, *rest)

    monkeypatch.setattr(scoring, "decode_trace", decode_trace)
    words = ("--videos", videos, "--out", out, "--protocol", "vbench")
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    with out.with_name("scores.jsonl.begun").open("a") as begun:
        begun.write('{"id": "12", "cells": 4}\n{"of": "1')  # as a kill leaves it
    assert not out.exists()
    cells = run(*words)
    assert scored == ["scrolls.mp4", "still.mp4", "still.mp4"] and {cell["file"] for cell in cells} == {"scrolls.mp4", "still.mp4"}
    first = out.read_bytes()
    run(*words)
    assert len(scored) == 3 and out.read_bytes() == first
    shutil.copyfile(folder / "scrolls.mp4", videos / "still.mp4")
    again = run(*words)
    assert scored[3:] == ["still.mp4"] and {cell["md5"] for cell in again} == {cells[0]["md5"]}
    run(*words, "--fps", "4")
    assert scored[4:] == ["scrolls.mp4", "still.mp4"]
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]))
    with pytest.raises(Refused, match=r"cells of still\.mp4: it was cut off; score the videos again; or remove .* to begin anew"):
        run(*words)


def test_a_judge_that_is_down_makes_failed_cells_that_the_next_start_asks_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = manifest(tmp_path / "manifest.jsonl", {"file": "still.mp4"})
    scored = []
    real = scoring.decode_trace
    monkeypatch.setattr(scoring, "decode_trace", lambda reader, path, *rest: scored.append(path.name) or real(reader, path, *rest))
    words = ("--videos", folder, "--manifest", listed, "--out", tmp_path / "scores.jsonl", "--judge-model", "m")
    for times in (1, 2):
        judged = [cell for cell in run(*words, "--judge", "http://127.0.0.1:9/v1") if "visual_stability" in cell["metric"]]
        assert [cell["value"] for cell in judged] == [None] and "127.0.0.1" in judged[0]["failed"] and len(scored) == times
        assert re.search(r"own +visual_stability@m +– +n = 0 of 0 prompts, 1 failed", capsys.readouterr().out)
    for answer, times in (("Score: 4", 3), ("Score: 4", 3), ("Score: 5", 4)):  # scored anew only with other answers
        (tmp_path / "answers.json").write_text(json.dumps({"still.mp4": answer}))
        run(*words[:-2], "--judge", tmp_path / "answers.json")
        assert len(scored) == times


def test_systems_are_averaged_apart_and_duplicates_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file": name, "prompt_id": "a", "seed": 0, "system": name[:-4]} for name in ("still.mp4", "scrolls.mp4")]
    (tmp_path / "p.json").write_text('{"a": "a cat"}')
    words = ("--videos", folder, "--prompts", tmp_path / "p.json", "--out", tmp_path / "out.jsonl", "--protocol", "vbench")
    run(*words, "--manifest", manifest(tmp_path / "m.jsonl", *rows))
    said = capsys.readouterr().out
    assert re.search(r"still vbench +dynamic_degree@ffmpeg-epzs +0\.0000 .* n = 1 of 1 prompts", said)
    assert re.search(r"scrolls vbench +dynamic_degree@ffmpeg-epzs +1\.0000 ", said) and "scrolls vbench/total: VBench's total needs" in said
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(Refused, match=r"line 2 names scrolls\.mp4 for prompt 'a', seed 0 of ours, and so does still\.mp4; keep one"):
        run(*words, "--manifest", manifest(tmp_path / "m.jsonl", *(row | {"system": "ours"} for row in rows)))
    assert not (tmp_path / "out.jsonl").exists()


def test_frames_are_taken_at_their_own_rate_or_resampled(folder: Path, tmp_path: Path) -> None:
    listed = manifest(tmp_path / "manifest.jsonl", {"file": "scrolls.mp4"})
    options = ("--videos", folder, "--manifest", listed, "--out", tmp_path / "scores.jsonl", "--protocol", "own")
    own, slow = (pick(run(*options, *more), "scrolls.mp4")["own", "flow_magnitude@ffmpeg-epzs"] for more in ((), ("--fps", "4")))
    assert slow == pytest.approx(2 * own, rel=0.1)  # half as many frames, each twice as far from the one before


def test_what_was_measured_is_kept_by_the_hashes_of_video_and_networks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another protocol decodes nothing, and gives what it gives without the folder; another rate, video or network does."""
    videos, features = tmp_path / "videos", tmp_path / "features"
    videos.mkdir()
    shutil.copyfile(folder / "scrolls.mp4", videos / "a.mp4")
    decoded: list[str] = []
    real = scoring.decode_trace

    def decode_trace(reader: Any, path: Path, *rest: Any) -> Any:
        decoded.append(path.name)
        return real(reader, path, *rest)

    monkeypatch.setattr(scoring, "decode_trace", decode_trace)
    run("--videos", videos, "--out", tmp_path / "1.jsonl", "--protocol", "vbench", "--features", features)
    kept = run("--videos", videos, "--out", tmp_path / "2.jsonl", "--features", features, "--judge", "heuristic")
    assert decoded == ["a.mp4"] and len(list(features.iterdir())) == 1
    assert kept == run("--videos", videos, "--out", tmp_path / "3.jsonl", "--judge", "heuristic") and len(decoded) == 2
    run("--videos", videos, "--out", tmp_path / "4.jsonl", "--features", features, "--fps", "4")
    assert len(decoded) == 3 and len(list(features.iterdir())) == 2, "the rate is part of what is kept"
    monkeypatch.setattr(encoders.PooledEncoder, "weights", "others")
    run("--videos", videos, "--out", tmp_path / "5.jsonl", "--features", features)
    assert len(decoded) == 4, "so are the networks"
    monkeypatch.undo()
    wrong = manifest(tmp_path / "m.jsonl", {"file": "a.mp4", "fps": 25})
    cells = run("--videos", videos, "--out", tmp_path / "6.jsonl", "--features", features, "--manifest", wrong)
    assert [cell["failed"] for cell in cells] == ["a.mp4 has 8 frames a second and the manifest says 25; correct the one that is wrong"]
    for file in features.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut off
    assert run("--videos", videos, "--out", tmp_path / "7.jsonl", "--features", features, "--judge", "heuristic") == kept
    shutil.copyfile(folder / "still.mp4", videos / "a.mp4")
    still = run("--videos", videos, "--out", tmp_path / "8.jsonl", "--features", features, "--judge", "heuristic")
    assert still != kept and not [file for file in features.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"file": "still.mp4"}, {"file": "still.mp4"}], r"line 2 names still\.mp4 a second time; keep one of the two"),
        (
            [{"file": name, "prompt_id": "cat", "seed": 0} for name in ("still.mp4", "scrolls.mp4")],
            r"line 2 names scrolls\.mp4 for prompt 'cat', seed 0, and so does still\.mp4; keep one of the two",
        ),
        ([{"file": "../x.mp4"}], r"line 1 names \.\./x\.mp4, which is outside"),
        ([{"prompt": "a"}], "line 1 names no file"),
        ([{"file": "still.mp4", "fps": "fast"}], "line 1: fps is 'fast'; it must be"),
        ([{"file": "still.mp4", "prompt_id": "dog"}], "line 1: prompt_id is 'dog', which --prompts, not given, does not hold"),
        ([{"file": "still.mp4", "seed": "0"}], "line 1: seed is '0'; it must be a whole number"),
        ([{"file": "still.mp4", "system": 1}], "line 1: system, suite, prompt and prompt_id are texts"),
        ([], "names no video"),
    ],
)
def test_a_manifest_that_contradicts_itself(folder: Path, tmp_path: Path, rows: list[dict[str, Any]], sentence: str) -> None:
    (tmp_path / "prompts.json").write_text('{"cat": "a cat"}')
    prompts = tmp_path / "prompts.json" if "cat" in sentence else None
    with pytest.raises(Refused, match=sentence):
        score.list_rows(folder, manifest(tmp_path / "manifest.jsonl", *rows), prompts)


def test_videos_that_are_not_what_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    listed = manifest(tmp_path / "manifest.jsonl", {"file": "still.mp4", "fps": 16}, {"file": "absent.mp4"})
    cells = run("--videos", folder, "--manifest", listed, "--out", tmp_path / "scores.jsonl")
    assert {cell["file"]: cell["failed"] for cell in cells} == {
        "still.mp4": "still.mp4 has 8 frames a second and the manifest says 16; correct the one that is wrong",
        "absent.mp4": "absent.mp4 is not there; check its name",
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--chunk", "3"), "--chunk and --window go together"),
        (("--repeats", "0"), "whole numbers from 1 on"),
        (("--judge", "http://127.0.0.1:9/v1"), "--judge-model names no model"),
        (("--judge", "nobody"), "--judge is nobody; it must be heuristic, a file of answers"),
        (("--weights", "nowhere"), "--weights nowhere has none of the folders dino, dinov2, clip, clip-large"),
    ],
)
def test_options_that_do_not_fit(folder: Path, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        run("--videos", folder, "--out", tmp_path / "scores.jsonl", *options)
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no video; name another folder"):
        score.list_rows(tmp_path, None, None)
    with pytest.raises(Refused, match="is no folder"):
        score.list_rows(tmp_path / "absent", None, None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the Hub: DINO pickled, as its repository has it, and CLIP in safetensors."""
    there = write_networks(tmp_path / "hub", "dino", "clip")
    state = load_file(there / "dino/model.safetensors")
    torch.save(state, there / "dino/pytorch_model.bin")
    (there / "dino/model.safetensors").unlink()
    folders = {encoders.PINNED[role].repository: there / role for role in ("dino", "clip")}

    def model_info(api: Any, name: str, *, revision: str, files_metadata: bool) -> Any:
        files = [
            SimpleNamespace(rfilename=file.name, lfs=SimpleNamespace(sha256=encoders.hash_file(file)) if file.suffix != ".json" else None)
            for file in folders[name].iterdir()
        ]
        return SimpleNamespace(siblings=files)

    def snapshot_download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert len(revision) == 40
        copy = tmp_path / "cache" / name.replace("/", "-")
        shutil.copytree(folders[name], copy, dirs_exist_ok=True)
        if (tmp_path / "damage").exists():
            (copy / allow_patterns[-1]).write_bytes(b"half")
        return str(copy)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there


def test_weights_are_fetched_with_their_hashes(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights"
    words = ["fetch-weights", "--out", str(out), "--only", "dino", "--only", "clip"]
    cf.main(words)
    assert sorted(file.name for file in (out / "dino").iterdir()) == ["config.json", "model.safetensors", "weights.json"]
    encoder = encoders.open_encoder("dino", out / "dino")
    assert encoder.suffix == "" and encoder.weights == "facebook/dino-vitb16@f205d5d8e640a89a2b8ef0369670dfc37cc07fc2"
    assert np.isfinite(encoder.encode(scrolling(2))).all() and encoders.ClipEncoder("clip", out / "clip").suffix == ""
    cf.main(words)
    assert "already there, every file as it was fetched" in capsys.readouterr().out
    (out / "dino/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not what was fetched"):
        cf.main(words)


def test_weights_that_come_damaged_leave_no_folder(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "damage").touch()
    for role, name in (("dino", "pytorch_model.bin"), ("clip", "model.safetensors")):
        with pytest.raises(Refused, match=f"{name} of .* came damaged; remove .* and fetch it again"):
            cf.main(["fetch-weights", "--out", str(tmp_path / "weights"), "--only", role])
        assert not (tmp_path / "weights" / role).exists()


def test_a_folder_of_ones_own_is_left_alone(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="was not fetched by this command"):
        cf.main(["fetch-weights", "--out", str(hub), "--only", "clip"])
