"""`cf video`: the files it leaves, what it refuses, and what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tasks.__main__ as cf
from cf_model import memory_strip
from cf_model.data import video, video_reader
from tasks.runner.process import is_deliberate
from tests.folders import SIZE, pipeline
from tests.preloaded import python_folder
from tests.small import spec
from tests.test_pipeline_class import TIMELINE, WORDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    pipeline().save_pretrained(folder)
    return folder


def generate(model: Path, *words: object, seconds: float = 1.5, prompt: str | None = WORDS) -> None:
    given = [] if prompt is None else ["--prompt", prompt]
    cf.main(["video", "--model", str(model), *given, "--seconds", str(seconds), *map(str, words)])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def frames(path: Path) -> np.ndarray:
    found = video_reader.probe_video(path)
    return video_reader.read_video(path, height=found.height, width=found.width, fps=found.fps)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- one video


def test_same_seed_same_bytes_and_nothing_else_is_left(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate(model, "--seed", seed, "--out", tmp_path / f"{name}.mp4")
    assert md5(tmp_path / "a.mp4") == md5(tmp_path / "b.mp4") != md5(tmp_path / "c.mp4")
    assert names(tmp_path) == {"a.mp4", "b.mp4", "c.mp4"}
    assert video_reader.probe_video(tmp_path / "a.mp4") == video_reader.VideoFacts(24, 16.0, SIZE, SIZE, Fraction(3, 2))


def test_the_file_holds_the_frames_of_the_pipeline(model: Path, tmp_path: Path) -> None:
    generate(model, "--out", tmp_path / "a.mp4", "--crf", 0)
    made = pipeline()(WORDS, seconds=1.5).astype(int)
    away = np.abs(frames(tmp_path / "a.mp4")[None].astype(int) - made[:, None]).mean((2, 3, 4))
    assert (away.argmin(0) == np.arange(24)).all()  # 4:2:0 costs colour, so equal they can't be


def test_a_killed_run_leaves_a_video_that_plays_and_no_half_written_out(model: Path, tmp_path: Path) -> None:
    words = ["video", "--model", str(model), "--prompt", WORDS, "--seconds", "3000", "--out", str(tmp_path / "a.mp4")]
    run = subprocess.Popen([sys.executable, "-m", "tasks", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    part, sizes = tmp_path / "a.partial.mp4", set[int]()
    try:
        ends = time.monotonic() + 60
        while len(sizes) < 5 and time.monotonic() < ends:
            sizes |= {part.stat().st_size} if part.exists() else set()
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(sizes) == 5 and names(tmp_path) == {"a.partial.mp4"}
    assert video_reader.probe_video(part).frames >= 8 and len(frames(part)) >= 8


def test_a_model_that_fails_before_its_first_chunk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cf_model.pipeline.denoise_chunk", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, "--out", tmp_path / "new/a.mp4", "--memory-strip", "beside")
    assert not list(tmp_path.iterdir())


def test_prompts_with_times_and_a_switch(model: Path, tmp_path: Path) -> None:
    """The new prompt is seen in its last chunk, from frame 21 on."""
    for name, *more in (("plain",), *((s, "--at", "1.2", "fog", "--switch", s) for s in ("recache", "flush", "keep"))):
        generate(model, "--out", tmp_path / f"{name}.mp4", "--crf", 0, *more)
    made = {name: frames(tmp_path / f"{name}.mp4") for name in ("plain", "recache", "flush", "keep")}
    assert len({video.tobytes() for video in made.values()}) == 4


def test_a_clip_is_gone_on_from(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(model, "--out", tmp_path / "clip.mp4", "--crf", 0, seconds=26 / 16)
    generate(model, "--out", tmp_path / "a.mp4", "--crf", 0, "--continue-from", tmp_path / "clip.mp4")
    assert "goes on from the last 21 of the clip's 26 frames" in capsys.readouterr().out
    clip, whole = frames(tmp_path / "clip.mp4"), frames(tmp_path / "a.mp4")
    assert len(whole) == 21 + 24
    away = np.abs(whole[None, :21].astype(int) - clip[:, None]).mean((2, 3, 4))
    assert (away.argmin(0) == np.arange(5, 26)).all()
    made = pipeline()(WORDS, seconds=1.5, continue_from=clip).astype(int)
    assert (np.abs(whole[None, 21:].astype(int) - made[:, None]).mean((2, 3, 4)).argmin(0) == np.arange(24)).all()


# --------------------------------------------------------------------------------------------------------- the strip


def test_the_trace_is_the_timeline_and_the_picture_a_picture(model: Path, tmp_path: Path) -> None:
    generate(model, "--out", tmp_path / "a.mp4", "--memory-strip", "beside", seconds=9.5)
    assert names(tmp_path) == {"a.mp4", "a.memory.jsonl", "a.memory.png"}
    rows = [json.loads(line) for line in (tmp_path / "a.memory.jsonl").read_text().splitlines()]
    assert {row["chunk"]: (row["sink"], row["slow"], row["fast"]) for row in rows} == TIMELINE
    assert [row["now"] for row in rows] == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(13)]
    assert {row["chunk"]: row["promoted"] for row in rows if row["promoted"]} == {4: [6], 6: [12], 8: [18], 10: [24], 12: [30]}
    assert [row["second"] for row in rows[:3]] == [0, 9 / 16, round(21 / 16, 4)]
    picture = Image.open(tmp_path / "a.memory.png").convert("RGB")
    seen = {tuple(colour) for _, colour in picture.getcolors(1 << 20) or []}
    assert picture.width > 1000 and {rgb(colour) for colour in memory_strip.COLOURS.values()} <= seen


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_burnt_strip_shows_what_is_held(model: Path, tmp_path: Path) -> None:
    chunk = dict(zip(("sink", "slow", "fast"), TIMELINE[4], strict=True)) | {"now": [12, 13, 14]}
    row = chunk | {"chunk": 4, "second": 2.8125, "promoted": [6], "real": False}
    picture = np.zeros((12, SIZE, SIZE, 3), np.uint8)
    shown = memory_strip.burn_strip(picture, row, spec(), 10.0)
    assert shown.shape[0] == 12 and shown.shape[2] % SIZE == 0 and shown.shape[1] > shown.shape[2]
    below = shown[0, shown.shape[2] :]  # frames are square

    def area(colour: str) -> int:
        return int((below == rgb(colour)).all(-1).sum())

    full = {part: area(colour) for part, colour in memory_strip.COLOURS.items()}
    assert full["fast"] > 800 and full["sink"] > 800 and full["now"] > 800
    empty = memory_strip.burn_strip(picture, row | {"slow": [], "promoted": []}, spec(), 10.0)[0, shown.shape[2] :]
    assert int((empty == rgb(memory_strip.COLOURS["slow"])).all(-1).sum()) < full["slow"] - 250
    assert area(memory_strip.FRESH) > 50  # the border of what was just promoted
    generate(model, "--out", tmp_path / "a.mp4", "--memory-strip", "burn")
    found = video_reader.probe_video(tmp_path / "a.mp4")
    assert names(tmp_path) == {"a.mp4"} and (found.height, found.width) == shown.shape[1:3] and found.frames == 24


# ---------------------------------------------------------------------------------------------------------- many videos


def test_a_file_of_prompts_is_a_folder_of_videos_that_can_be_resumed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text(f"fog\n\n{WORDS}\nthe sea\n")
    words = ("--prompts-file", tmp_path / "p.txt", "--out", tmp_path / "out")
    generate(model, *words, prompt=None)
    index = (tmp_path / "out/index.jsonl").read_text()
    assert [json.loads(line) for line in index.splitlines()][1] == {"line": 3, "prompt": WORDS, "file": "00003.mp4"}
    generate(model, "--out", tmp_path / "alone.mp4")
    assert md5(tmp_path / "alone.mp4") == md5(tmp_path / "out/00003.mp4")
    before = {file.name: (md5(file), file.stat().st_mtime_ns) for file in (tmp_path / "out").glob("*.mp4")}
    (tmp_path / "out/00004.mp4").unlink()
    (tmp_path / "out/index.jsonl").write_text(index[:-10])  # killed while it wrote the last row
    generate(model, *words, prompt=None)
    after = {file.name: (md5(file), file.stat().st_mtime_ns) for file in (tmp_path / "out").glob("*.mp4")}
    assert {name for name in before if before[name] != after[name]} == {"00004.mp4"}
    assert after["00004.mp4"][0] == before["00004.mp4"][0] and (tmp_path / "out/index.jsonl").read_text() == index
    with pytest.raises(ValueError, match=r"out was begun with another --seconds; use the same, or name another"):
        generate(model, *words, prompt=None, seconds=2)
    (tmp_path / "p.txt").write_text("mist\n")
    with pytest.raises(ValueError, match=r"p.txt line 1 is not the prompt that .*out holds a video of"):
        generate(model, *words, prompt=None)


def test_a_line_of_several_prompts_is_the_video_of_at(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(f"fog[0.5s] | {WORDS}\n")
    generate(model, "--prompts-file", tmp_path / "p.txt", "--out", tmp_path / "out", prompt=None)
    generate(model, "--at", "0.5", WORDS, "--out", tmp_path / "alone.mp4", prompt="fog")
    assert md5(tmp_path / "alone.mp4") == md5(tmp_path / "out/00001.mp4")
    (tmp_path / "p.txt").write_text(f"fog\nfog[50s] | {WORDS}\n")
    with pytest.raises(ValueError, match="line 2: a prompt's time is 50 s, but the last chunk"):
        generate(model, "--prompts-file", tmp_path / "p.txt", "--out", tmp_path / "other", prompt=None)
    assert not (tmp_path / "other").exists(), "said before the first video"


@pytest.mark.parametrize(
    ("bad", "said"),
    [("caf\udce9", "line 9123 is not UTF-8 text"), ("word " * 20, "line 9123: the prompt 'word .*' has 20 words, .* reads 16")],
)
def test_one_bad_line_among_ten_thousand_is_said_before_the_first_video(model: Path, tmp_path: Path, bad: str, said: str) -> None:
    lines = [bad if n == 9_123 else f"disc {n}" for n in range(1, 10_001)]
    (tmp_path / "p.txt").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=said):
        generate(model, "--prompts-file", tmp_path / "p.txt", "--out", tmp_path / "out", prompt=None)
    assert names(tmp_path) == {"p.txt"}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "seconds is 0"),
        (["--prompt", "word " * 5000], "has 5000 words, which are 5000 tokens, but the text encoder reads 16"),
        (["--out", "there.mp4"], "there.mp4 is already there; name another file, or remove it"),
        (["--out", "a.avi"], "--out is a.avi; name a file that ends in .mp4"),
        (["--at", "soon", "fog"], "--at soon fog does not begin with a time; write --at SECONDS TEXT"),
        (["--at", "60", "fog"], "a prompt's time is 60 s, but the last chunk of 5 s begins at"),
        (["--at", "3", "fog", "--at", "2", "sun"], "times 3 and 2 s do not rise"),
        (["--memory", "promote=often"], "--memory promote is 'often'; it must be similarity, uniform, random, none"),
        (["--memory", "interval=two"], "--memory interval=two is no whole number; write interval=2 or the like"),
        (["--memory", "slow"], "--memory slow has no =; write KEY=VALUE"),
        (["--memory", "size=3"], "--memory size is not a setting; known are sink, slow"),
        (["--memory", "promote=none"], "--memory slow is 12 but promote is none"),
        (["--model", "no"], "no is no folder; `cf export --to diffusers"),
        (["--threads", "0"], "--threads is 0; use 1 or more"),
        (["--continue-from", "no.mp4"], "--continue-from no.mp4 is not there"),
        (["--continue-from", "there.mp4"], "--continue-from there.mp4: there.mp4 is not a video"),
        (["--continue-from", "wide.mp4"], "wide.mp4 is 64 x 32, but the model makes 32 x 32; add --resize"),
        (["--continue-from", "wide.mp4", "--resize"], "continue_from has 5 frames, but a chunk is 9; use a longer clip"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: list[str], said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.mp4").write_text("no video")
    if "wide.mp4" in words:
        video.write_video(Path("wide.mp4"), np.zeros((5, 32, 64, 3), np.uint8), fps=16, crf=12)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=said) as refused:
        generate(model, "--out", "a.mp4", *words, seconds=5)
    assert "\n" not in str(refused.value) and is_deliberate(refused.value)
    assert names(tmp_path) == before


def test_help_shows_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        cf.main(["video", "--help"])
    said = capsys.readouterr().out
    assert "examples:" in said and said.count("cf video --model out/student") >= 4 and "--memory-strip" in said


def test_the_command_needs_no_project_around_it(model: Path, tmp_path: Path) -> None:
    """No params.yaml and no dvc.yaml; one clear line on stderr, exit code 2."""
    words = [python_folder() / "python", "-m", "tasks", "video", "--model", str(model.parent), "--prompt", WORDS, "--out", "a.mp4"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("cf video: ") and done.stderr.count("\n") == 1, done.stderr
    assert "holds no model_index.json, so it is no model folder" in done.stderr
