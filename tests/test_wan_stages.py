"""The stages codec and encode as the profile wan-1.3b runs them, on a small copy of Wan's published folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import pytest
import torch

from cf_model.codec.codec_file import load_codec
from cf_model.codec.wan_codec import load_wan_codec
from cf_model.data import worlds
from cf_model.data.latents import Latents
from cf_model.data.video import write_video
from cf_model.data.video_reader import read_video
from cf_model.text.umt5 import UMT5Encoder
from tasks import codec, encode
from tasks.params.schema import CodecParams, Encode, Text, Video
from tasks.parts import hub
from tests import pretrained

CAPTIONS = ["a red disc.", "a blue square turns slowly", "a red disc."]
TOKENS = 12


def params(folder: Path | str | None, **sections: Any) -> Any:
    """Only the sections that these stages may look at."""
    linear = {"channels": 4, "ridge": 1e-4, "width": 8, "steps": 0, "batch": 1, "lr": 1e-3}
    ours = {
        "seed": 3,
        "video": Video(height=32, width=64, fps=16),
        "codec": CodecParams(kind="wan", weights=folder and str(folder), clips=1, linear=linear),
        "text": Text(kind="umt5", weights=folder and str(folder), tokens=TOKENS, channels=pretrained.WIDTH, negative="a sea"),
        "encode": Encode(shard_mib=0.05, dtype="bfloat16", decoder="pyav"),
    }
    return SimpleNamespace(**(ours | sections))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, of more than a piece and less than a latent left over, and weights."""
    root = tmp_path_factory.mktemp("wan")
    (root / "clips").mkdir()
    rows = []
    for number, caption in enumerate(CAPTIONS):
        file = f"clip-{number:05d}.mp4"
        write_video(root / "clips" / file, worlds.render_clip(worlds.draw_world(number), 71, height=32, width=64, fps=16), fps=16, crf=12)
        split = "heldout" if number == 2 else "train"
        rows.append({"id": file.removesuffix(".mp4"), "file": file, "caption": caption, "kept": True, "split": split})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrained.save(root / "weights")
    return root


@pytest.fixture(scope="module")
def made(root: Path) -> dict[str, dict[str, float]]:
    track = MagicMock(work=root / "work")
    given = {"clips": root / "clips", "manifest": root / "manifest.jsonl"}
    return {
        "codec": codec.run(params(root / "weights"), track, out=root / "codec", **given),
        "encode": encode.run(params(root / "weights"), track, codec=root / "codec", out=root / "latents", **given),
    }


def clip(root: Path, number: int) -> torch.Tensor:
    return torch.from_numpy(read_video(root / f"clips/clip-{number:05d}.mp4", height=32, width=64, fps=16))[None, :69]


def test_the_codec_is_brought_and_measured(root: Path, made: dict[str, dict[str, float]]) -> None:
    theirs = load_wan_codec(root / "weights")
    ours = load_codec(root / "codec")
    assert torch.equal(ours.encode(clip(root, 2)), theirs.encode(clip(root, 2)))
    error = (theirs.decode(theirs.encode(clip(root, 2))).double() - clip(root, 2).double()).square().mean()
    assert made["codec"]["psnr"] == made["codec"]["psnr_worst"] == pytest.approx(10 * np.log10(255**2 / float(error)), rel=1e-6)
    assert made["codec"]["clips"] == 0, "none was fitted on"


def test_clips_and_captions_are_encoded(root: Path, made: dict[str, dict[str, float]]) -> None:
    store = Latents(root / "latents")
    assert made["encode"]["frames"] == 3 * 18 and made["encode"]["captions"] == 2 and store.shape == (4, 4, 8)
    vae = load_wan_codec(root / "weights")
    for row in range(3):
        assert torch.equal(store.window([row], [0], 18), vae.encode(clip(root, row)).bfloat16().float())
    text = UMT5Encoder(root / "weights", TOKENS, pretrained.WIDTH)
    assert torch.equal(store.text([0, 1, 2]), text.encode(CAPTIONS).bfloat16().float())
    assert torch.equal(torch.stack([store.empty_text, store.null_text]), text.encode(["", "a sea"]).bfloat16().float())


def test_weights_are_checked_before_any_clip_is_read(root: Path, tmp_path: Path) -> None:
    text = params(root / "weights").text.model_copy(update={"channels": 4096})
    given = {"clips": tmp_path / "none", "manifest": root / "manifest.jsonl"}
    with pytest.raises(ValueError, match=r"text\.channels is 4096, but .*text_encoder gives vectors of 24; use 24"):
        encode.run(params(root / "weights", text=text), MagicMock(), codec=root / "codec", out=tmp_path / "latents", **given)
    refused = {None: r"codec\.weights is null; name a folder", root: r"holds no config\.json", "not/a/folder": "which is no folder here"}
    for folder, said in refused.items():
        with pytest.raises(ValueError, match=said):
            codec.run(params(folder), MagicMock(), out=tmp_path / "codec", **given)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- the Hub


def test_what_is_downloaded_is_said_before(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, *, dry_run: bool = False, **how: Any) -> Any:
        asked.append({"name": name, "dry_run": dry_run} | how)
        assert dry_run or capsys.readouterr().err.startswith(
            "codec.weights: downloading 1 file, 0.51 GB, of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (vae) from https://"
        )
        return [SimpleNamespace(file_size=507_000_000 + n, will_download=n > 0) for n in range(2)] if dry_run else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve_weights("codec.weights", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers@0fad780", ["vae"]) == tmp_path
    files = {"revision": "0fad780", "allow_patterns": ["vae/*.json", "vae/*.safetensors"], "name": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
    assert asked == [files | {"dry_run": True}, files | {"dry_run": False}]


def test_without_a_network_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, the Hub's library looks into its cache and asks nobody; a folder never needs it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"text\.weights is some/thing, no folder here, and the Hub did not give it .*; name a folder"):
        hub.resolve_weights("text.weights", "some/thing", ["text_encoder"])
    assert hub.resolve_weights("text.weights", str(tmp_path), ["text_encoder"]) == tmp_path
