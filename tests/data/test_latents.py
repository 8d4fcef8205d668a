"""Encoded clips: what is read is what was written, in shards of bounded size that a killed writer goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open

from cf_model.data.latent_writer import join_parts, write_latents
from cf_model.data.latents import INDEX, Latents
from cf_model.data.shard_writer import MIB, ShardWriter
from cf_model.data.shards import shard_name
from cf_model.text.encoder import WordEncoder
from tests.small import write_clips

CAPTIONS = ["a red disc", "a blue square", "a red disc", "fog", "a blue square"]
LENGTHS = [9, 5, 9, 7, 21]
LATENT = 4 * 2 * 3 * 4  # bytes


def clips() -> list[tuple[dict[str, str], torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [
        (
            {"id": f"clip-{i:05d}", "caption": caption, "split": "heldout" if i == 3 else "train"},
            torch.randn(length, 4, 2, 3, generator=rng),
        )
        for i, (caption, length) in enumerate(zip(CAPTIONS, LENGTHS, strict=True))
    ]


def written(folder: Path, dtype: torch.dtype = torch.float32, shard: int = 16) -> Latents:
    """`shard`: latents of float32 that fit into one."""
    write_clips(folder, clips(), WordEncoder(6, 8).encode, shard_mib=shard * LATENT / MIB, dtype=dtype, negative="dull")
    return Latents(folder)


def list_names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return sorted(opened.keys())


def test_windows_are_the_latents_that_were_written(tmp_path: Path) -> None:
    store = written(tmp_path)
    latents = [shard_name("latents", number) for number in range(3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [INDEX, *latents, "text-00000.safetensors", "text.safetensors"]
    window = store.window(torch.tensor([4, 0, 1]), [16, 2, 0], 5)
    assert window.shape == (3, 5, 4, 2, 3) and window.dtype == torch.float32
    for got, (row, start) in zip(window, ((4, 16), (0, 2), (1, 0)), strict=True):
        assert torch.equal(got, clips()[row][1][start : start + 5])
    assert (store.channels, store.height, store.width, store.fps) == (4, 2, 3, 16.0)
    assert [store.frames(row) for row in range(5)] == LENGTHS


def test_a_shard_is_no_larger_than_it_may_be_unless_one_clip_is(tmp_path: Path) -> None:
    written(tmp_path)  # 9 + 5, 9 + 7, and 21 of 16
    held = [list_names(tmp_path / shard_name("latents", number)) for number in range(3)]
    assert held == [["clip-00000", "clip-00001"], ["clip-00002", "clip-00003"], ["clip-00004"]]
    written(tmp_path / "half", torch.bfloat16)  # twice as many fit: 9 + 5 + 9 + 7 of 32
    assert len(list((tmp_path / "half").glob("latents-*"))) == 2


def test_the_index_says_of_each_clip_where_it_is_and_what_it_is_of(tmp_path: Path) -> None:
    written(tmp_path)
    rows = parquet.read_table(tmp_path / INDEX).to_pylist()
    assert [row["shard"] for row in rows] == [0, 0, 1, 1, 2] and [row["frames"] for row in rows] == LENGTHS
    assert [row["caption_id"] for row in rows] == [0, 1, 0, 2, 1] and [row["caption"] for row in rows] == CAPTIONS
    assert rows[3]["md5"] == "md5 of clip-00003" and rows[3]["split"] == "heldout"


def kill_at(number: int) -> Any:
    """An encoder of clips that is killed before it has made the clip of this number; it counts what it made."""
    made, asked = dict(enumerate(latents for _, latents in clips())), list[str]()

    def encode(about: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        row = int(about["id"][-5:])
        if row == number:
            raise KeyboardInterrupt
        asked.append(about["id"])
        return made[row], {"md5": f"md5 of {about['id']}"}

    return encode, asked


@pytest.mark.parametrize("damage", ["nothing", "a cut line", "a lost shard"])
def test_a_killed_writer_goes_on_after_its_last_complete_shard_with_the_same_bytes(tmp_path: Path, damage: str) -> None:
    written(tmp_path / "whole")
    abouts, folder = [about for about, _ in clips()], tmp_path / "killed"
    settings: Any = {"shard_mib": 16 * LATENT / MIB, "dtype": torch.float32, "fps": 16.0, "negative": "dull"}
    encode, asked = kill_at(4)
    with pytest.raises(KeyboardInterrupt):
        write_latents(folder, abouts, encode, WordEncoder(6, 8).encode, **settings)
    assert asked == ["clip-00000", "clip-00001", "clip-00002", "clip-00003"] and not (folder / INDEX).exists()
    if damage == "a cut line":
        with (folder / "latents.jsonl").open("a") as file:
            file.write('{"clip-00002": {"md')
    if damage == "a lost shard":
        (folder / shard_name("latents", 0)).unlink()
    encode, asked = kill_at(-1)
    write_latents(folder, abouts, encode, WordEncoder(6, 8).encode, **settings)
    first = 0 if damage == "a lost shard" else 2  # shard 1 was not complete: the clip behind it never came
    assert asked == [f"clip-{number:05d}" for number in range(first, 5)]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }


def test_each_distinct_caption_is_embedded_once(tmp_path: Path) -> None:
    asked, encoder = list[str](), WordEncoder(6, 8)

    def encode(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return encoder.encode(texts)

    write_clips(tmp_path, clips(), encode, negative="dull")
    assert asked == ["", "dull", "a red disc", "a blue square", "fog"]


def test_parts_are_joined_as_they_are() -> None:
    parts = [torch.randn(length, 4, 2, 3, generator=torch.Generator().manual_seed(length)) for length in (1, 16, 16, 3)]
    joined = join_parts(iter(parts))
    assert torch.equal(joined, torch.cat(parts)) and joined.untyped_storage().nbytes() == joined.nbytes
    with pytest.raises(ValueError, match="gave no latents"):
        join_parts([])


def test_at_most_one_shard_waits_in_memory(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "any", 10 * 4 / MIB)
    for number in range(50):
        writer.add(str(number), torch.full((7, 4), float(number))[:3, :1])  # 12 bytes of 112
        assert len(writer.waiting) <= 3 and all(one.untyped_storage().nbytes() == 12 for one in writer.waiting.values())
        assert len(json.loads((tmp_path / "any.jsonl").read_text().splitlines()[-1])) == 3 if number >= 3 else True
    assert writer.close() == 17 and not (tmp_path / "any.jsonl").exists()


def test_splits_share_no_clip_and_leave_none_out(tmp_path: Path) -> None:
    store = written(tmp_path)
    assert store.rows("train") == [0, 1, 2, 4] and store.rows("heldout") == [3]
    assert store.captions(store.rows("heldout")) == ["fog"]
    assert store.rows("train", at_least=9) == [0, 2, 4]
    with pytest.raises(ValueError, match="no heldout clip of 9 latent frames"):
        store.rows("heldout", at_least=9)


def test_text_is_the_captions_own_and_null_is_zero(tmp_path: Path) -> None:
    store, encoder = written(tmp_path), WordEncoder(6, 8)
    assert torch.equal(store.text([4, 0, 3]), encoder.encode(["a blue square", "a red disc", "fog"]))
    assert torch.equal(store.empty_text, torch.zeros(6, 8))
    assert torch.equal(store.null_text, WordEncoder(6, 8).encode(["dull"])[0])
    with safe_open(tmp_path / "text-00000.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {"00000000": [3, 8], "00000001": [3, 8], "00000002": [1, 8]}, "without the zeros past the end"


@pytest.mark.parametrize(("start", "length"), [(5, 5), (-1, 3), (0, 10)])
def test_a_window_outside_the_clip_is_refused(tmp_path: Path, start: int, length: int) -> None:
    with pytest.raises(ValueError, match="clip-00000 has 9 latent frames"):
        written(tmp_path).window([0], [start], length)


def test_same_clips_same_bytes_and_half_precision_reads_as_float(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, torch.bfloat16)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    window = Latents(tmp_path / "a").window([0], [0], 9)
    assert window.dtype == torch.float32 and torch.allclose(window[0], clips()[0][1], rtol=1e-2)
    texts = WordEncoder(6, 8).encode([CAPTIONS[3], "dull"]).bfloat16().float()
    assert torch.equal(torch.stack([Latents(tmp_path / "a").text([3])[0], Latents(tmp_path / "a").null_text]), texts)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the stage encode first"):
        Latents(tmp_path)
    with pytest.raises(ValueError, match="no clips to write"):
        write_clips(tmp_path, [], WordEncoder(6, 8).encode)
    odd = [clips()[0], ({"id": "b", "caption": "", "split": "train"}, torch.zeros(3, 4, 2, 2))]
    with pytest.raises(ValueError, match="b has latents of"):
        write_clips(tmp_path, odd, WordEncoder(6, 8).encode)
