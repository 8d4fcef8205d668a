"""What is kept beside the outs saves work and decides nothing: with it, without it, and with it damaged, the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.data import worlds
from cf_model.data.video import write_video
from tasks import clips, encode
from tasks import filter as filtering
from tasks.parts import clip_cache
from tests.once import copy_of
from tests.test_clips import folder, rows

FACTS = ("measured", "encoded", "captions_encoded")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_of("three-films", film_three, tmp_path / "raw")


def film_three(at: Path) -> None:
    for seed, name in enumerate(("b_one.mp4", "d_two.mp4", "f_three.mp4")):
        film(at / name, seed)


def film(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    write_video(path, worlds.render_clip(worlds.draw_world(seed), 177, height=32, width=32, fps=16), fps=16, crf=20)


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return coded(tmp_path / "codec", 0)


def coded(path: Path, seed: int) -> Path:
    made = LinearCodec(channels=4, width=4)
    made.encoder.copy_(torch.linalg.qr(torch.randn(made.encoder.shape, generator=torch.Generator().manual_seed(seed)))[0])
    save_codec(made, path)
    return path


def night(source: Path, codec: Path, out: Path, **changed: Any) -> tuple[dict[str, bytes], dict[str, int]]:
    """clips, filter and encode; all bytes that they write, and how much of it they had to work out."""
    p, track = folder(source), MagicMock(work=out / "work", facts={})
    for name, value in changed.items():
        setattr(p, name, value)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    clips.run(p, track, out=out / "clips")
    metrics = filtering.run(p, track, clips=out / "clips", out=out / "manifest.jsonl")
    metrics |= encode.run(p, track, clips=out / "clips", manifest=out / "manifest.jsonl", codec=codec, out=out / "latents")
    files = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    return files | {"metrics": repr(sorted(metrics.items())).encode()}, {name: track.facts[name] for name in FACTS}


def test_one_new_clip_is_the_only_one_read_and_the_bytes_are_those_of_a_run_from_nothing(
    source: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    _, worked = night(source, codec, tmp_path / "first")
    assert worked == {"measured": 3, "encoded": 3, "captions_encoded": 4}  # and the empty text, which is the null prompt, too
    film(source / "c_new.mp4", 7)  # in the middle: the shards move
    more, worked = night(source, codec, tmp_path / "second")
    assert worked == {"measured": 1, "encoded": 1, "captions_encoded": 1}
    monkeypatch.setenv("CF_KEPT", "off")
    nothing, worked = night(source, codec, tmp_path / "second")
    assert worked["measured"] == worked["encoded"] == 4
    assert more == nothing
    assert sum(row["kept"] for row in rows(tmp_path / "second" / "manifest.jsonl")) == 4


def test_a_bad_new_clip_is_rejected_and_costs_the_others_nothing(
    source: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    before, _ = night(source, codec, tmp_path / "out")
    whole = (source / "b_one.mp4").read_bytes()
    (source / "e_cut.mp4").write_bytes(whole[: len(whole) // 2])
    (source / "a_not.mp4").write_bytes(os.urandom(5000))
    after, worked = night(source, codec, tmp_path / "out")
    assert worked == {"measured": 2, "encoded": 0, "captions_encoded": 0}
    assert [row["reason"] for row in rows(tmp_path / "out" / "manifest.jsonl")] == ["unreadable", None, None, "unreadable", None]
    same = [name for name in before if name.startswith("latents/")]
    assert len(same) == 4 and all(before[name] == after[name] for name in same), "so that nothing is trained for it"


def test_what_it_depends_on_is_in_the_name(source: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    night(source, codec, tmp_path / "out")
    p = folder(source)
    half = p.encode.model_copy(update={"dtype": "float16"})
    assert night(source, coded(tmp_path / "other", 1), tmp_path / "out")[1]["encoded"] == 3
    assert night(source, codec, tmp_path / "out", encode=half)[1]["encoded"] == 3
    assert night(source, codec, tmp_path / "out", text=p.text.model_copy(update={"tokens": 9}))[1]["captions_encoded"] == 4
    assert night(source, codec, tmp_path / "out")[1] == dict.fromkeys(FACTS, 0)
    monkeypatch.setattr(clip_cache.importlib.metadata, "version", lambda name: "another")
    assert night(source, codec, tmp_path / "out")[1]["measured"] == 3


@pytest.mark.parametrize("hurt", [lambda old: old[:-1], lambda old: b"", lambda old: old[:50] + bytes([old[50] ^ 1]) + old[51:]])
def test_a_damaged_entry_is_made_again(source: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurt: Any) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    whole, _ = night(source, codec, tmp_path / "out")
    for file in (tmp_path / "kept").glob("*/??/*"):
        file.write_bytes(hurt(file.read_bytes()))
    again, worked = night(source, codec, tmp_path / "out")
    assert again == whole and worked == {"measured": 3, "encoded": 3, "captions_encoded": 4}
    assert night(source, codec, tmp_path / "out")[1] == dict.fromkeys(FACTS, 0)


def test_what_nothing_asks_for_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path))
    shelf = clip_cache.ClipCache("any", {}, modules=("tasks.parts.clip_cache",), libraries=())
    for name in ("old", "new", "used"):
        shelf.put(name, name.encode())
    for name in ("old", "used"):
        os.utime(str(shelf.entry_path(name)), (0, time.time() - 31 * 86400))
    assert shelf.get("used") == b"used"
    shelf.sweep()
    assert [shelf.get(name) for name in ("old", "new", "used")] == [None, b"new", b"used"]
