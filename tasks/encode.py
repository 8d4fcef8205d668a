"""encode: every kept clip as latents, every caption as an embedding, once, so that training never decodes a video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cf_model.data.latents import write_latents
from cf_model.model.codec import load_codec

from .device import device
from .frames import frames
from .params import Params
from .text import text_encoder
from .tracking import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Writes data/latents: safetensors shards of whole clips and of their captions' embeddings, and index.json."""
    rows = [row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if row["kept"]]
    text, model = text_encoder(params.text).to(device()), load_codec(codec).to(device())
    progress = track.progress(len(rows), unit="clip")
    total, square, count = 0.0, 0.0, 0

    def encoded() -> Iterator[tuple[dict[str, Any], Tensor]]:
        nonlocal total, square, count
        for row in rows:
            latents = torch.cat([part[0].cpu() for part in model.encode_stream(frames(clips / row["file"], params.video))])
            exact = latents.double()
            total, square, count = total + exact.sum().item(), square + exact.square().sum().item(), count + exact.numel()
            yield {key: row[key] for key in ("id", "caption", "split")}, latents
            progress.update()

    dtype: torch.dtype = getattr(torch, params.encode.dtype)
    negative, shard = params.text.negative, params.encode.shard
    entries = write_latents(out, encoded(), text.encode, shard=shard, dtype=dtype, fps=params.video.fps, negative=negative)
    mean = total / count
    return {
        "clips": len(entries),
        "frames": sum(entry["frames"] for entry in entries),
        "captions": len({entry["caption"] for entry in entries}),
        "mean": mean,
        "std": max(0.0, square / count - mean**2) ** 0.5,
    }
