"""What `cf import-weights` refuses: each in one sentence that names the weight, the key or the file, with nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from tasks.runner.process import is_deliberate
from tests.checkpoints import FILE, HEADS, ORIGINAL, OTHER, OURS, WAN, before, diffusers, flat, folder, imported, original, pt, sharded


def refused(said: str, src: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        imported(src, *words)
    assert is_deliberate(error.value) and "\n" not in str(error.value)
    assert not (src.parent / "imported").exists() and not list(src.parent.glob("*.partial"))


def test_missing_unknown_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    lost = {name: tensor for name, tensor in WAN.items() if "cross_attn.norm" not in name}
    refused(r"lacks blocks\.0\.attn2\.norm_k\.weight, blocks\.0\.\S+, blocks\.1\.\S+ and 1 more \(4 in all\)", flat(tmp_path, lost), *HEADS)
    more = flat(tmp_path, WAN | {"img_emb.proj.0.bias": torch.zeros(3)})
    refused(r"wan\.safetensors: img_emb\.proj\.0\.bias is no weight that original Wan", more, *HEADS)
    more = flat(tmp_path, OURS | {"blocks.0.attn3.x": torch.zeros(3)})
    refused(r"holds blocks\.0\.attn3\.x, which it should not", more, *HEADS)
    bent = WAN | {"blocks.1.self_attn.q.weight": torch.zeros(24, 12)}
    refused(r"wrong shape for blocks\.1\.attn1\.to_q\.weight as \[24, 12\] for \[24, 24\]", flat(tmp_path, bent), *HEADS)
    coarse = WAN | {"head.head.bias": torch.zeros(16, dtype=torch.uint8)}
    refused(r"stores proj_out\.bias as uint8, which is quantised", flat(tmp_path, coarse), *HEADS)
    unsized = {name: tensor for name, tensor in WAN.items() if name != "patch_embedding.weight"}
    refused(r"patch_embedding\.weight is missing or of another rank", flat(tmp_path, unsized), *HEADS)
    gap = {name.replace("blocks.1.", "blocks.5."): tensor for name, tensor in WAN.items()}
    refused(r"lacks blocks\.1\..* holds blocks\.5\.", flat(tmp_path, gap), *HEADS)


def test_half_of_a_model_is_never_loaded_for_a_foreign_prefix(tmp_path: Path) -> None:
    """The neighbours' strict=False loads nothing of such a file, and says nothing."""
    refused(r"net\.blocks\.0\.\S+, .* is no weight that original Wan", flat(tmp_path, before("net.", WAN)), *HEADS)


def test_the_same_weight_twice_is_refused(tmp_path: Path) -> None:
    refused("head.head.bias twice, under different wrappers", pt(tmp_path, WAN | {"model.head.head.bias": torch.zeros(16)}), *HEADS)


def test_heads_must_be_known_and_agree(tmp_path: Path) -> None:
    refused(r"24 wide, narrower than Wan's smallest \(1536\), and do not say .*; state their number with --heads", flat(tmp_path))
    refused("--heads is 3, but .*config says 2; leave the option out", diffusers(tmp_path), "--heads", "3")


def test_branches_are_those_of_the_file(tmp_path: Path) -> None:
    raw = pt(tmp_path, {"generator": WAN})
    refused("--branch is ema, but .* holds raw; choose what is there", raw, *HEADS, "--branch", "ema")
    refused("--branch is ema, but .* holds one set of weights", flat(tmp_path), *HEADS, "--branch", "ema")
    refused("--branch is raw, but .* holds no branches", pt(tmp_path, WAN), *HEADS, "--branch", "raw")
    refused("holds a critic only; --branch critic imports it", pt(tmp_path, {"critic": OTHER}), *HEADS)
    refused(r"holds optimizer, student and none of generator_ema, generator", pt(tmp_path, {"student": WAN, "optimizer": {}}), *HEADS)
    refused("holds step among the weights, which are no tensors", pt(tmp_path, {"generator": WAN | {"step": 3}}), *HEADS)
    refused("holds no dictionary of weights", pt(tmp_path, [torch.zeros(3)]), *HEADS)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['CF_EVIL']}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_command_does_not_run_it(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_EVIL", str(tmp_path / "ran"))
    tree = {"generator": WAN | {"evil": Evil()}}
    src = pt(tmp_path, tree) if zipped else tmp_path / "model.pt"
    if not zipped:
        src.write_bytes(pickle.dumps(Evil()))
    refused("posix.system besides tensors, which could run code" if zipped else "in the format of torch before 1.6", src, *HEADS)
    assert not (tmp_path / "ran").exists()
    torch.load(src, weights_only=False) if zipped else pickle.loads(src.read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run it"


def test_truncated_and_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    for keep in (0, 4, 100, -7):
        whole = flat(tmp_path).read_bytes()
        flat(tmp_path).write_bytes(whole[:keep])
        refused(r"wan\.safetensors is truncated or damaged", tmp_path / "wan.safetensors", *HEADS)
    for keep in (0, 100, -100):
        whole = pt(tmp_path, {"generator": WAN}).read_bytes()
        (tmp_path / "model.pt").write_bytes(whole[:keep])
        refused(r"model\.pt is truncated, damaged", tmp_path / "model.pt", *HEADS)
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("model/other.txt", "a zip, but no checkpoint")
    refused(r"model\.pt is truncated, damaged", tmp_path / "model.pt", *HEADS)


def test_folders_of_something_else(tmp_path: Path) -> None:
    refused("isn't there; nothing is downloaded here", tmp_path / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    (tmp_path / "empty").mkdir()
    refused("holds no weights", tmp_path / "empty")
    (tmp_path / "x.txt").touch()
    refused("x.txt is no file of weights", tmp_path / "x.txt")
    refused("describes AutoencoderKLWan, not Wan's transformer", folder(tmp_path / "vae", OURS, {"_class_name": "AutoencoderKLWan"}))
    refused("takes 36 channels and gives 4", folder(tmp_path / "i2v", WAN, ORIGINAL | {"in_dim": 36}))
    bare = folder(tmp_path / "bare", WAN, {"_class_name": "WanModel", "dim": 24})
    refused("bare: the config states no usable sizes: num_layers is None", bare)
    (original(tmp_path) / "config.json").write_text("{")
    refused("config.json is no JSON", tmp_path / "Wan2.1")
    two = folder(tmp_path / "two", OURS, {"_class_name": "WanTransformer3DModel"})
    (two / FILE).rename(two / "a.safetensors")
    (two / "b.safetensors").write_bytes((two / "a.safetensors").read_bytes())
    refused("holds a.safetensors, b.safetensors; name the one to import", two)


def test_a_shard_that_is_not_there_or_not_inside(tmp_path: Path) -> None:
    src = sharded(tmp_path)
    index = json.loads((src / f"{FILE}.index.json").read_text())
    index["weight_map"]["proj_out.bias"] = "../diffusion.safetensors"
    (src / f"{FILE}.index.json").write_text(json.dumps(index))
    refused(r"names \.\./diffusion\.safetensors, which is not in the folder; fetch the missing shards", src)


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    src = flat(tmp_path)
    (tmp_path / "imported").mkdir()
    imported(src, *HEADS)  # an empty one is as good as none
    kept = (tmp_path / "imported" / FILE).read_bytes()
    with pytest.raises(ValueError, match="is there and not empty; name a new folder"):
        imported(flat(tmp_path, OTHER), *HEADS)
    assert (tmp_path / "imported" / FILE).read_bytes() == kept
