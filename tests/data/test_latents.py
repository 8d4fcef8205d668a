from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cf_model.data.latents import Latents, write_latents
from cf_model.text.encoder import WordEncoder

CAPTIONS = ["a red disc", "a blue square", "a red disc", "fog", "a blue square"]
LENGTHS = [9, 5, 9, 7, 21]


def clips() -> list[tuple[dict[str, str], torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [
        (
            {"id": f"clip-{i:05d}", "caption": caption, "split": "heldout" if i == 3 else "train"},
            torch.randn(length, 4, 2, 3, generator=rng),
        )
        for i, (caption, length) in enumerate(zip(CAPTIONS, LENGTHS, strict=True))
    ]


def written(folder: Path, dtype: torch.dtype = torch.float32) -> Latents:
    write_latents(folder, iter(clips()), WordEncoder(6, 8).encode, shard=2, dtype=dtype, fps=16.0, negative="dull")
    return Latents(folder)


def test_windows_are_the_latents_that_were_written(tmp_path: Path) -> None:
    store = written(tmp_path)
    shards = [f"{kind}-0000{i}.safetensors" for kind in ("latents", "text") for i in range(3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", *shards, "text.safetensors"]
    window = store.window(torch.tensor([4, 0, 1]), [16, 2, 0], 5)
    assert window.shape == (3, 5, 4, 2, 3) and window.dtype == torch.float32
    for got, (row, start) in zip(window, ((4, 16), (0, 2), (1, 0)), strict=True):
        assert torch.equal(got, clips()[row][1][start : start + 5])
    assert (store.channels, store.height, store.width, store.fps) == (4, 2, 3, 16.0)
    assert [store.frames(row) for row in range(5)] == LENGTHS


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
    with safe_open(tmp_path / "text-00001.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {"clip-00002": [3, 8], "clip-00003": [1, 8]}, "without the zeros past the end"


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
        write_latents(tmp_path, [], WordEncoder(6, 8).encode, shard=2, dtype=torch.float32, fps=16.0, negative="dull")
    odd = [clips()[0], ({"id": "b", "caption": "", "split": "train"}, torch.zeros(3, 4, 2, 2))]
    with pytest.raises(ValueError, match="b has latents of"):
        write_latents(tmp_path, odd, WordEncoder(6, 8).encode, shard=2, dtype=torch.float32, fps=16.0, negative="dull")
