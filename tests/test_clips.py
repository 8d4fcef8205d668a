"""The stages clips, filter and encode, on a small set of the kind they are made for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.data import worlds
from cf_model.data.latents import Latents
from cf_model.data.planted import PLANTED
from cf_model.data.video import write_video
from cf_model.data.video_reader import read_video
from tasks import clips, encode
from tasks import filter as filtering
from tasks.params.schema import Clips, Encode, Filter, Text, Video

SHARED = Path(__file__).parents[2] / "shared" / "clips"


def params(**sections: Any) -> Any:
    """Only the sections that these stages may look at."""
    ours = {
        "seed": 3,
        "video": Video(height=32, width=32, fps=16),
        "clips": Clips(source="worlds", folder=None, table=None, fetch=None, worlds=worlds.PLAIN, count=12, bad=1, frames=182, crf=12),
        "filter": Filter(
            min_seconds=10.0,
            min_fps=15.0,
            min_side=32,
            min_share=0.5,
            max_clipped=0.4,
            min_motion=0.5,
            max_repeats=0.6,
            max_shake=0.05,
            max_cut=2.5,
            cuts="reject",
            trim=1.0,
            min_sharpness=1.0,
            max_border=0.2,
            max_text=0.1,
            min_words=1,
            min_distance=8.0,
            networks=[],
            captioner=None,
            heldout=3,
            workers=2,
            timeout=60.0,
        ),
        "text": Text(kind="words", weights=None, tokens=12, channels=16, negative=""),
        "encode": Encode(shard_mib=0.1, dtype="float32", decoder="pyav"),
        # what the filter asks of later stages: lengths, in latents
        "base": SimpleNamespace(window=5),
        "teacher": SimpleNamespace(view=SimpleNamespace(context="memory", chunk=3), shortest=3, target=6),
        "causal_init": SimpleNamespace(longest=6, frames=6),
        "stage2": SimpleNamespace(rollout=SimpleNamespace(begin="share", chunk=3, window=9), horizon=SimpleNamespace(longest=21)),
        "generate": SimpleNamespace(prefix=9),
        "samples": SimpleNamespace(teacher=SimpleNamespace(every=10, prefix=6)),
    }
    return SimpleNamespace(**(ours | sections))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of every kind, and their manifest."""
    root = tmp_path_factory.mktemp("made")
    clips.run(params(), MagicMock(), out=root / "clips")
    filtering.run(params(), MagicMock(), clips=root / "clips", out=root / "manifest.jsonl")
    return root


def test_every_planted_clip_is_caught_for_its_own_reason_and_no_good_one_is_lost(made: Path) -> None:
    manifest = {row["id"]: row for row in rows(made / "manifest.jsonl")}
    planted = {row["id"]: row["planted"] for row in rows(made / "clips" / "clips.jsonl")}
    assert sorted(kind for kind in planted.values() if kind) == sorted(PLANTED) and len(planted) == 19
    assert manifest.keys() == planted.keys()
    for name, kind in planted.items():
        row = manifest[name]
        assert row["reason"] == (PLANTED[kind] if kind else None), row
        assert row["kept"] == (kind is None)
        if kind:
            assert row["rule"] and (row["value"] is not None or row["reason"] == "unreadable") and row["split"] is None
        else:
            assert (row["fps"], row["frames"], row["seconds"], row["rule"], row["value"]) == (16.0, 182, 11.375, None, None)


def test_names_do_not_tell_and_the_filter_does_not_ask(made: Path, tmp_path: Path) -> None:
    listed = rows(made / "clips" / "clips.jsonl")
    assert [row["id"] for row in listed] == [f"clip-{i:05d}" for i in range(19)]
    bad = [i for i, row in enumerate(listed) if row["planted"]]
    assert max(bad) - min(bad) > len(bad)  # not in one run
    blind = tmp_path / "clips"
    blind.mkdir()
    for row in listed:
        (blind / row["file"]).hardlink_to(made / "clips" / row["file"])
    (blind / "clips.jsonl").write_text("".join(json.dumps({key: row[key] for key in ("id", "file", "caption")}) + "\n" for row in listed))
    filtering.run(params(), MagicMock(), clips=blind, out=tmp_path / "manifest.jsonl")
    assert (tmp_path / "manifest.jsonl").read_bytes() == (made / "manifest.jsonl").read_bytes()


def test_truth_is_what_was_rendered(made: Path) -> None:
    row = next(row for row in rows(made / "clips" / "clips.jsonl") if not row["planted"])
    number = int(row["id"].removeprefix("clip-"))
    world = worlds.draw_world(3 * 1_000_000 + 2 * number)
    assert row["caption"] == world.caption and row["truth"]["heading"] == world.truth(182, 16)["heading"]
    seen = read_video(made / "clips" / row["file"], height=32, width=32, fps=16)
    assert np.abs(seen - worlds.render_clip(world, 182, height=32, width=32, fps=16).astype(int)).mean() < 6


def test_same_seed_same_bytes_and_another_seed_other_worlds(made: Path, tmp_path: Path) -> None:
    few = Clips(source="worlds", folder=None, table=None, fetch=None, worlds=worlds.PLAIN, count=2, bad=1, frames=182, crf=12)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        clips.run(params(clips=few, seed=seed), MagicMock(), out=tmp_path / name)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert contents[0] == contents[1]
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


def test_heldout_clips_are_few_and_have_different_captions(made: Path) -> None:
    kept = [row for row in rows(made / "manifest.jsonl") if row["kept"]]
    heldout = [row["caption"] for row in kept if row["split"] == "heldout"]
    assert len(heldout) == 3 == len(set(heldout)) and sum(row["split"] == "train" for row in kept) == 9


def test_encode_then_read(made: Path, tmp_path: Path) -> None:
    codec = LinearCodec(channels=6, width=4)
    codec.encoder.copy_(torch.linalg.qr(torch.randn(codec.encoder.shape, generator=torch.Generator().manual_seed(0)))[0])
    save_codec(codec, tmp_path / "codec")
    metrics = encode.run(
        params(),
        MagicMock(work=tmp_path / "work"),
        clips=made / "clips",
        manifest=made / "manifest.jsonl",
        codec=tmp_path / "codec",
        out=tmp_path / "latents",
    )
    store = Latents(tmp_path / "latents")
    kept = [row for row in rows(made / "manifest.jsonl") if row["kept"]]
    assert [(clip["id"], clip["split"]) for clip in store.clips] == [(row["id"], row["split"]) for row in kept]
    assert metrics["clips"] == 12 and metrics["frames"] == 12 * 46  # 182 frames are 1 + 4 * 45, and one too many
    everything = store.window(list(range(12)), [0] * 12, 46)
    assert np.isclose(metrics["std"], everything.std(correction=0).item(), rtol=1e-4)
    video = read_video(made / "clips" / kept[7]["file"], height=32, width=32, fps=16)[:181]
    assert torch.equal(store.window([7], [0], 46), codec.encode(torch.from_numpy(video)[None]))
    assert store.captions([7]) == [kept[7]["caption"]]


@pytest.mark.slow
def test_no_clip_passes(made: Path, tmp_path: Path) -> None:
    """One sentence, and the manifest says of every clip why."""
    out = tmp_path / "manifest.jsonl"
    out.write_text("earlier")
    strict = params().filter.model_copy(update={"min_seconds": 100.0})
    counts = r"\(18 too_short, 1 unreadable; the first: clip-00000\.mp4, seconds > 100\.0, 1601 frames at 16 fps; it has 182\)"
    with pytest.raises(ValueError, match=rf"no clip of .*clips passes the filter {counts}"):
        filtering.run(params(filter=strict), MagicMock(), clips=made / "clips", out=out)
    assert len(rows(out)) == 19 and not any(row["kept"] for row in rows(out))
    greedy = params().filter.model_copy(update={"heldout": 12})
    with pytest.raises(ValueError, match=r"filter.heldout is 12, but only 12 of .*clips pass the filter \(.*; the first: .*\.mp4, "):
        filtering.run(params(filter=greedy), MagicMock(), clips=made / "clips", out=out)
    with pytest.raises(ValueError, match="run the stage clips first"):
        filtering.run(params(), MagicMock(), clips=tmp_path, out=out)
    later = params(teacher=SimpleNamespace(view=SimpleNamespace(context="memory", chunk=3), shortest=40, target=6))
    with pytest.raises(ValueError, match=r"shortest \+ teacher.target is 48 latents, so 189 frames, but the longest training clip has 46"):
        filtering.run(later, MagicMock(), clips=made / "clips", out=out)
    with pytest.raises(ValueError, match=r"only 0 clips have 193 frames, which generate.prefix and a chunk needs"):
        filtering.run(params(generate=SimpleNamespace(prefix=46)), MagicMock(), clips=made / "clips", out=out)
    with pytest.raises(ValueError, match=r"frames >= 201 at 16 fps \(12.56 s\), which training needs; 181 of its 182 are whole latents"):
        filtering.run(params(base=SimpleNamespace(window=51)), MagicMock(), clips=made / "clips", out=out)


def folder(path: Path) -> Any:
    return params(
        clips=Clips(source="folder", folder=path, table=None, fetch=None, worlds=worlds.PLAIN, count=0, bad=0, frames=1, crf=12),
        filter=params().filter.model_copy(update={"heldout": 0}),
    )


def test_a_folder_of_anything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "more").mkdir(parents=True)
    for seed, name in enumerate(("a_red-disc.mp4", "more/second.MP4")):
        write_video(source / name, worlds.render_clip(worlds.draw_world(seed), 200, height=64, width=96, fps=20), fps=20, crf=12)
    (source / "more" / "second.txt").write_text(" a caption\nof two lines \n")
    (source / "fake.mp4").write_text("not a video")
    (source / "notes.md").write_text("no video either")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    p = folder(source)
    p.filter = p.filter.model_copy(update={"min_seconds": 9.0})
    assert clips.run(p, MagicMock(), out=tmp_path / "clips") == {"clips": 3, "planted": 0}
    listed = rows(tmp_path / "clips" / "clips.jsonl")
    assert [(row["source"], row["caption"]) for row in listed] == [
        ("a_red-disc.mp4", "a red disc"),
        ("fake.mp4", "fake"),
        ("more/second.MP4", "a caption of two lines"),
    ]
    filtering.run(p, MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    assert [(row["kept"], row["rule"]) for row in rows(tmp_path / "manifest.jsonl")] == [
        (True, None),
        (False, "fake.mp4 is not a video, or has lost its header; replace it"),
        (True, None),
    ]
    (tmp_path / "clips" / listed[0]["file"]).write_bytes(b"")
    assert {file: file.read_bytes() for file in before} == before  # the user's own files are never touched


def test_folders_without_videos(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no video")
    with pytest.raises(ValueError, match=r"clips.folder is .*, which has no video"):
        clips.run(folder(tmp_path), MagicMock(), out=tmp_path / "clips")
    with pytest.raises(ValueError, match="which is no folder"):
        clips.run(folder(tmp_path / "absent"), MagicMock(), out=tmp_path / "clips")
    write_video(tmp_path / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=16, crf=12)
    (tmp_path / "a.txt").write_text(" \n")
    clips.run(folder(tmp_path), MagicMock(), out=tmp_path / "clips")
    with pytest.raises(ValueError, match=r"no clip .* \(1 caption; the first: a\.mp4, a\.txt is empty; write a\.mp4's caption in it"):
        filtering.run(folder(tmp_path), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")


@pytest.mark.parametrize("size", [(40, 32), (32, 35)])
def test_sizes_that_no_world_has(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"video.height is {size[0]} and video.width {size[1]}"):
        clips.run(params(video=Video(height=size[0], width=size[1], fps=16)), MagicMock(), out=tmp_path / "clips")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/clips")
def test_real_clips_from_a_folder(tmp_path: Path) -> None:
    clips.run(folder(SHARED), MagicMock(), out=tmp_path / "clips")
    filtering.run(folder(SHARED), MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    listed = {row["id"]: row["source"] for row in rows(tmp_path / "clips" / "clips.jsonl")}
    reasons = {listed[row["id"]]: row["reason"] for row in rows(tmp_path / "manifest.jsonl")}
    assert {name for name, reason in reasons.items() if reason is None} == {"flipping_a_pancake.mkv"}
    assert reasons["nasa_13013.mp4"] == "hard_cut" and reasons["pose.mp4"] == "too_short"
    assert reasons["corrupted.mp4"] == "unreadable" and reasons["av1_video.mkv"] == "too_short"
    long = {row["source"] for row in rows(tmp_path / "manifest.jsonl") if row["values"].get("too_short", 0) > 10}
    assert long == {"flipping_a_pancake.mkv", "nasa_13013.mp4"}
