"""Stage `encode`: accepted clips to latents and captions to embeddings, once, so that training never decodes a video."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.data.latents import join_parts, sum_latents, summarize_entries, write_latents
from tasks.files.atomic import swap_into_place
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, read_json_lines
from tasks.params.schema import Params, Video
from tasks.parts.caption_encoder import CaptionEncoder
from tasks.parts.clip_cache import ClipCache
from tasks.parts.codec_frames import ClipReader
from tasks.parts.device import choose_device
from tasks.runner.track import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Write data/latents: safetensors shards of clips and of their captions' embeddings, and index.parquet.

    The shards are written in the working folder, so that a stage that was killed goes on after the last complete one.
    """
    rows = [row for row in read_json_lines(manifest) if row["kept"]]
    text, progress = CaptionEncoder(params.text, "text"), track.progress(len(rows), unit="clip")
    pictures = ClipEncoder(clips, codec, params.video, getattr(torch, params.encode.dtype), progress.update)
    layout: dict[str, Any] = {
        "shard_mib": params.encode.shard_mib,
        "dtype": pictures.dtype,
        "fps": params.video.fps,
        "negative": params.text.negative,
    }
    with pictures.reader:
        entries = write_latents(track.work / "latents", rows, pictures.encode, text.encode, **layout)
    progress.close()
    swap_into_place(track.work / "latents", out)
    for cache in (pictures.cache, text.cache):
        cache.sweep()
    track.facts |= {"encoded": pictures.cache.new_entries, "captions_encoded": text.cache.new_entries}
    return summarize_entries(entries)


class ClipEncoder:
    """Encoder of clips with a cache: a clip that was encoded before is read back."""

    def __init__(self, clips: Path, codec: Path, video: Video, dtype: torch.dtype, count: Callable[[], object]) -> None:
        self.clips, self.codec, self.dtype, self.count = clips, load_codec(codec).to(choose_device()), dtype, count
        self.reader = ClipReader(clips, video)
        about = {"codec": compute_dvc_md5(codec), "video": video.model_dump(), "dtype": str(dtype), "device": choose_device().type}
        parts = ("cf_model.data.video_reader", "cf_model.codec.interface", "tasks.encode", "tasks.parts.codec_frames")
        modules = (*parts, type(self.codec).__module__)
        self.cache = ClipCache("latents", about, modules=modules, libraries=("av", "diffusers", "torch"))

    def encode(self, row: Row) -> tuple[Tensor, dict[str, Any]]:
        """Return a clip's latents [F, C, H, W] as they are stored, its file's md5, and count, sum and sum of squares before rounding."""
        md5 = compute_dvc_md5(self.clips / row["file"])
        content = f"{md5} {row.get('start')} {row.get('length')}"
        if payload := self.cache.get(content):
            entry = load(payload)
        else:
            exact = join_parts(part[0].cpu() for part in self.codec.encode_stream(self.reader.read(row)))
            entry = {"latents": exact.to(self.dtype).contiguous(), "sums": sum_latents(exact)}
            self.cache.put(content, save(entry))
        total, square = entry["sums"].tolist()
        self.count()
        return entry["latents"], {"md5": md5, "count": entry["latents"].numel(), "sum": total, "square": square}
