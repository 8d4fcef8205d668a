"""encode: every kept clip as latents, every caption as an embedding, once, so that training never decodes a video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cf_model.data.latents import write_latents
from cf_model.data.video import read_video
from cf_model.model.codec import latent_frames, load_codec, video_frames
from cf_model.model.text import WordEncoder

from .params import Params
from .tracking import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Writes data/latents: safetensors shards of whole clips, a table of caption embeddings, and index.json."""
    if params.text.kind != "words":
        raise NotImplementedError(f"text.kind is {params.text.kind}, which is not built yet; use words")
    rows = [row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()) if row["kept"]]
    text, model, size = WordEncoder(params.text.tokens, params.text.channels), load_codec(codec), params.video
    progress = track.progress(len(rows), unit="clip")
    total, square, count = 0.0, 0.0, 0

    def encoded() -> Iterator[tuple[dict[str, Any], Tensor]]:
        nonlocal total, square, count
        for row in rows:
            video = read_video(clips / row["file"], height=size.height, width=size.width, fps=size.fps)
            # Whole latent frames: the first is one video frame, every other is four; the rest of the clip is dropped.
            video = video[: video_frames(latent_frames(len(video)))]
            latents = model.encode(torch.from_numpy(video)[None])[0]
            exact = latents.double()
            total, square, count = total + exact.sum().item(), square + exact.square().sum().item(), count + exact.numel()
            yield {key: row[key] for key in ("id", "caption", "split")}, latents
            progress.update()

    dtype: torch.dtype = getattr(torch, params.encode.dtype)
    negative, shard = params.text.negative, params.encode.shard
    entries = write_latents(out, encoded(), text.encode, shard=shard, dtype=dtype, fps=size.fps, negative=negative)
    mean = total / count
    return {
        "clips": len(entries),
        "frames": sum(entry["frames"] for entry in entries),
        "captions": len({entry["caption"] for entry in entries}),
        "mean": mean,
        "std": max(0.0, square / count - mean**2) ** 0.5,
    }
