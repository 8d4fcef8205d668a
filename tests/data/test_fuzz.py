"""Damaged copies of real files: no crash of the caller, no hang, and no frame accepted that is not the file's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cf_model.data.measures import FileMeasures, measure_file
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess

CLIPS = Path(__file__).parents[3] / "shared" / "clips"
SMALL = ("av1_video.mkv", "h264_10bits.mp4", "h265_video.mp4", "unordered.mov", "rotated_90.mov", "corrupted.mp4")
COPIES = 12  # of each file and kind of damage; slow: 2,400 in all


def flip_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = np.frombuffer(content, np.uint8).copy()
    damaged[rng.integers(len(damaged), size=rng.integers(1, 30))] = rng.integers(256)
    return damaged.tobytes()


def damage_header(content: bytes, rng: np.random.Generator) -> bytes:
    return flip_bytes(content[:2000], rng) + content[2000:]


def cut_off(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(1, len(content))]


def lose_middle(content: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(content), size=2))
    return content[:first] + content[last:]


def join_halves(content: bytes, rng: np.random.Generator) -> bytes:
    at = rng.integers(len(content))
    return content[at:] + content[:at]


@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
@pytest.mark.parametrize("copies", [COPIES, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip_bytes, damage_header, cut_off, lose_middle, join_halves])
def test_damaged_copies_are_refused_or_read(tmp_path: Path, damage: object, copies: int) -> None:
    rng = np.random.default_rng(0)
    paths, origins = [], []
    for name in SMALL:
        content = (CLIPS / name).read_bytes()
        for copy in range(copies):
            path = tmp_path / f"{copy}-{name}"
            path.write_bytes(damage(content, rng))  # type: ignore[operator]
            paths.append(path)
            origins.append(name)
    whole = dict(read_in_subprocess(partial(measure_file, fps=16), [CLIPS / name for name in SMALL], workers=1, timeout=60.0))
    frames = {name: whole[i].frames if isinstance(whole[i], FileMeasures) else 0 for i, name in enumerate(SMALL)}
    answers = dict(read_in_subprocess(partial(measure_file, fps=16), paths, workers=2, timeout=60.0))
    assert len(answers) == len(paths)
    refused = [answer.sentence for answer in answers.values() if isinstance(answer, Unreadable)]
    assert all((sentence.count("\n") == 0 and "; " in sentence) or "cut off" in sentence for sentence in refused)
    assert not [sentence for sentence in refused if "was not read within" in sentence]
    for i, answer in answers.items():
        if isinstance(answer, FileMeasures) and damage is cut_off and paths[i].suffix in (".mp4", ".mov"):
            assert answer.facts.frames > 0 and answer.frames == frames[origins[i]], f"{paths[i].name}: fewer frames are accepted"
