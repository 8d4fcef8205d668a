"""Stage `encode`: accepted clips to latents and captions to embeddings, once, so that training never decodes a video."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.data.clip_encoder import MODULES, ClipEncoder
from cf_model.data.latent_writer import summarize_entries, write_latents
from cf_model.device import choose_device
from tasks.files.atomic import swap_into_place
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, stream_json_lines
from tasks.files.settings import read_settings
from tasks.params.schema import Params
from tasks.parts.caption_encoder import open_caption_encoder
from tasks.parts.clip_cache import ClipCache
from tasks.runner.track import Track


@dataclass(frozen=True)
class AcceptedClips:
    """The manifest's accepted rows, read from the file each time, because memory must not grow with the number of clips."""

    manifest: Path
    first: int = 0  # rows before it are left out

    def __iter__(self) -> Iterator[Row]:
        return islice((row for row in stream_json_lines(self.manifest) if row["kept"]), self.first, None)


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Write data/latents: safetensors shards of clips and of their captions' embeddings, and index.parquet.

    The shards are written in the working folder, so that a stage that was killed goes on after the last complete one.
    """
    rows = AcceptedClips(manifest)
    video, dtype = params.video.model_dump(), getattr(torch, params.encode.dtype)
    about = {
        "codec": compute_dvc_md5(codec),
        "video": video,
        "dtype": str(dtype),
        "device": choose_device().type,
        "decoder": params.encode.decoder,
    }
    modules = (*MODULES, type(load_codec(codec)).__module__)
    latents_cache = ClipCache("latents", about, modules=modules, libraries=("av", "diffusers", "torch"))
    pictures = ClipEncoder(
        clips,
        codec,
        video,
        dtype,
        cache=latents_cache,
        compute_md5=compute_dvc_md5,
        cluster=read_settings().dask,
        decoder=params.encode.decoder,
    )
    text, text_cache = open_caption_encoder(params.text, "text")
    progress = track.progress(sum(1 for _ in rows), unit="clip")

    encoding: Iterator[tuple[Mapping[str, Any], tuple[Tensor, dict[str, Any]]]] | None = None

    def take_encoded(row: Row) -> tuple[Tensor, dict[str, Any]]:
        """Return a clip's latents; the first one that is not in a complete shard says where encoding begins."""
        nonlocal encoding
        if encoding is None:
            first = next(number for number, one in enumerate(rows) if one["id"] == row["id"])
            encoding = pictures.encode(AcceptedClips(manifest, first))
        encoded = next(encoded for clip, encoded in encoding if clip["id"] == row["id"])
        progress.update()
        return encoded

    layout: dict[str, Any] = {
        "shard_mib": params.encode.shard_mib,
        "dtype": dtype,
        "fps": params.video.fps,
        "negative": params.text.negative,
    }
    try:
        entries = write_latents(track.work / "latents", rows, take_encoded, text.encode, **layout)
    finally:
        pictures.close()
    progress.close()
    swap_into_place(track.work / "latents", out)
    for cache in (latents_cache, text_cache):
        cache.sweep()
    track.facts |= {"encoded": latents_cache.new_entries, "captions_encoded": text_cache.new_entries}
    if params.encode.decoder == "decord":  # of all clips; the others were read by PyAV
        track.facts |= {"read_by_decord": sum(entry["by_decord"] for entry in entries)}
    return summarize_entries(entries)
