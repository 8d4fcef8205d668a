"""encode: every kept clip as latents, every caption as an embedding, once, so that training never decodes a video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.data.latents import trim_padding, write_latents
from cf_model.text.encoder import TextEncoder
from tasks.params.schema import Params, Text, Video
from tasks.parts.clip_cache import ClipCache, digest
from tasks.parts.codec_frames import read_frames
from tasks.parts.device import choose_device
from tasks.parts.text_encoder import open_text_encoder
from tasks.runner.track import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Writes data/latents: safetensors shards of whole clips and of their captions' embeddings, and index.json."""
    rows = [row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if row["kept"]]
    dtype: torch.dtype = getattr(torch, params.encode.dtype)
    text, pictures = CaptionEncoder(params.text), ClipEncoder(codec, params.video, dtype)
    progress = track.progress(len(rows), unit="clip")
    total, square, count = 0.0, 0.0, 0

    def encoded() -> Iterator[tuple[dict[str, Any], Tensor]]:
        nonlocal total, square, count
        for row in rows:
            latents, of_all = pictures.encode(clips / row["file"])
            total, square, count = total + of_all[0].item(), square + of_all[1].item(), count + latents.numel()
            yield {key: row[key] for key in ("id", "caption", "split")}, latents
            progress.update()

    negative, shard = params.text.negative, params.encode.shard
    entries = write_latents(out, encoded(), text.encode, shard=shard, dtype=dtype, fps=params.video.fps, negative=negative)
    for kept in (pictures.kept, text.kept):
        kept.sweep()
    track.facts |= {"encoded": pictures.kept.made, "captions_encoded": text.kept.made}
    mean = total / count
    return {
        "clips": len(entries),
        "frames": sum(entry["frames"] for entry in entries),
        "captions": len({entry["caption"] for entry in entries}),
        "mean": mean,
        "std": max(0.0, square / count - mean**2) ** 0.5,
    }


class ClipEncoder:
    """Clips as latents; one that was encoded before is read back."""

    def __init__(self, codec: Path, video: Video, dtype: torch.dtype) -> None:
        self.codec, self.video, self.dtype = load_codec(codec).to(choose_device()), video, dtype
        about = {"codec": digest(codec), "video": video.model_dump(), "dtype": str(dtype), "device": choose_device().type}
        modules = ("cf_model.data.video", "cf_model.codec.linear", type(self.codec).__module__, "tasks.encode", "tasks.parts.codec_frames")
        self.kept = ClipCache("latents", about, modules=modules, libraries=("decord", "diffusers", "torch"))

    def encode(self, file: Path) -> tuple[Tensor, Tensor]:
        """The clip's latents as they are stored, and the sums of the exact ones and of their squares."""
        content = digest(file)
        if payload := self.kept.get(content):
            found = load(payload)
            return found["latents"], found["sums"]
        exact = torch.cat([part[0].cpu() for part in self.codec.encode_stream(read_frames(file, self.video))])
        wide = exact.double()
        found = {"latents": exact.to(self.dtype).contiguous(), "sums": torch.stack([wide.sum(), wide.square().sum()])}
        self.kept.put(content, save(found))
        return found["latents"], found["sums"]


class CaptionEncoder:
    """Texts as embeddings, one by one, so that the same text gives the same numbers whatever stands beside it."""

    def __init__(self, spec: Text) -> None:
        self.encoder: TextEncoder = open_text_encoder(spec).to(choose_device())
        files = list(list_encoder_files(getattr(self.encoder, "folder", None)))
        stated = spec.model_dump(exclude={"negative"}) | {"files": files, "device": choose_device().type}
        modules = (type(self.encoder).__module__, "tasks.encode", "tasks.parts.text_encoder")
        self.kept = ClipCache("text", stated, modules=modules, libraries=("torch", "transformers"))

    def encode(self, texts: list[str]) -> Tensor:
        return torch.stack([self.one(text) for text in texts])

    def one(self, text: str) -> Tensor:
        if payload := self.kept.get(text):
            there = load(payload)["text"]
        else:
            there = trim_padding(self.encoder.encode([text])[0])
            self.kept.put(text, save({"text": there}))
        whole = there.new_zeros(self.encoder.tokens, there.shape[1])
        whole[: len(there)] = there
        return whole


def list_encoder_files(folder: Path | None) -> Iterator[tuple[str, int, int]]:
    """The encoder's files, to see that they have changed. # Choice: not their bytes, of which UMT5 has 11 GB."""
    for part in ("text_encoder", "tokenizer") if folder else ():
        for file in sorted((folder or Path()).joinpath(part).iterdir()):
            yield f"{part}/{file.name}", file.stat().st_size, file.stat().st_mtime_ns
