"""Stage `encode`: accepted clips to latents and captions to embeddings, once, so that training never decodes a video."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.data.clip_pool import ClipPool
from cf_model.data.latents import join_parts, sum_latents, summarize_entries, write_latents
from cf_model.data.subprocess_reader import Unreadable
from tasks.files.atomic import swap_into_place
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, read_json_lines
from tasks.files.settings import read_settings
from tasks.params.schema import Params, Video
from tasks.parts.caption_encoder import CaptionEncoder
from tasks.parts.clip_cache import ClipCache
from tasks.parts.codec_frames import ClipReader
from tasks.parts.device import choose_device
from tasks.runner.track import Track

LONGEST = 86_400.0  # seconds that one clip may take to be encoded; its file may pause for less (tasks/parts/codec_frames.py)


def run(params: Params, track: Track, *, clips: Path, manifest: Path, codec: Path, out: Path) -> dict[str, float]:
    """Write data/latents: safetensors shards of clips and of their captions' embeddings, and index.parquet.

    The shards are written in the working folder, so that a stage that was killed goes on after the last complete one.
    """
    rows = [row for row in read_json_lines(manifest) if row["kept"]]
    text, pictures = CaptionEncoder(params.text, "text"), ClipEncoder(clips, codec, params.video, getattr(torch, params.encode.dtype))
    progress = track.progress(len(rows), unit="clip")

    encoding: Iterator[tuple[Row, tuple[Tensor, dict[str, Any]]]] | None = None

    def take_encoded(row: Row) -> tuple[Tensor, dict[str, Any]]:
        """Return a clip's latents; the first one that is not in a complete shard says where encoding begins."""
        nonlocal encoding
        encoding = encoding or pictures.encode(rows[rows.index(row) :])
        encoded = next(encoded for clip, encoded in encoding if clip is row)
        progress.update()
        return encoded

    layout: dict[str, Any] = {
        "shard_mib": params.encode.shard_mib,
        "dtype": pictures.dtype,
        "fps": params.video.fps,
        "negative": params.text.negative,
    }
    try:
        entries = write_latents(track.work / "latents", rows, take_encoded, text.encode, **layout)
    finally:
        pictures.close()
    progress.close()
    swap_into_place(track.work / "latents", out)
    for cache in (pictures.cache, text.cache):
        cache.sweep()
    track.facts |= {"encoded": pictures.cache.new_entries, "captions_encoded": text.cache.new_entries}
    return summarize_entries(entries)


class Clip(NamedTuple):
    """A row of the manifest on its way to an encoder."""

    name: str  # of its file
    row: Row


class ClipEncoder:
    """Encoder of clips, one a GPU or one here, with a cache: a clip that was encoded before is read back."""

    def __init__(self, clips: Path, codec: Path, video: Video, dtype: torch.dtype) -> None:
        self.clips, self.dtype = clips, dtype
        about = {"codec": compute_dvc_md5(codec), "video": video.model_dump(), "dtype": str(dtype), "device": choose_device().type}
        parts = ("cf_model.data.video_reader", "cf_model.codec.interface", "tasks.encode", "tasks.parts.codec_frames")
        modules = (*parts, type(load_codec(codec)).__module__)
        self.cache = ClipCache("latents", about, modules=modules, libraries=("av", "diffusers", "torch"))
        self.settings = (clips.absolute(), codec.absolute(), tuple(video.model_dump().items()), dtype, torch.get_num_threads())
        self.task = partial(encode_clip, settings=self.settings, exact=torch.are_deterministic_algorithms_enabled())

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[Row, tuple[Tensor, dict[str, Any]]]]:
        """Yield each clip's row, and its latents [F, C, H, W] as they are stored with its file's md5, and count, sum and sum of squares
        before rounding.
        """
        gpus, md5s = list_gpus(), deque[str]()

        def list_contents() -> Iterator[tuple[str, Clip]]:
            """Yield what each clip's latents depend on, and the clip; its md5 waits in `md5s` for its latents."""
            for row in rows:
                md5s.append(compute_dvc_md5(self.clips / row["file"]))
                yield f"{md5s[-1]} {row.get('start')} {row.get('length')}", Clip(row["file"], row)

        each_its_own = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
        pool = ClipPool(len(gpus) if len(gpus) > 1 else 0, LONGEST, read_settings().dask, each_its_own)
        payloads = pool.compute_payloads(self.cache, list_contents(), self.task)
        for row, payload in zip(rows, payloads, strict=True):
            md5 = md5s.popleft()
            if isinstance(payload, Unreadable):
                raise ValueError(payload.sentence)
            entry = load(payload)
            total, square = entry["sums"].tolist()
            yield row, (entry["latents"], {"md5": md5, "count": entry["latents"].numel(), "sum": total, "square": square})

    def close(self) -> None:
        """End the reader and free the codec of this process, if it has encoded a clip."""
        if open_encoder.cache_info().currsize:
            open_encoder(*self.settings)[1].__exit__()
            open_encoder.cache_clear()


def encode_clip(clip: Clip, *, settings: tuple[Any, ...], exact: bool) -> bytes:
    """Encode a clip, in whichever process, and return its latents and sums as bytes of safetensors."""
    if exact:
        torch.use_deterministic_algorithms(True, warn_only=True)
    codec, reader, dtype = open_encoder(*settings)
    latents = join_parts(part[0].cpu() for part in codec.encode_stream(reader.read(clip.row)))
    return save({"latents": latents.to(dtype).contiguous(), "sums": sum_latents(latents)})


@lru_cache(maxsize=1)
def open_encoder(clips: Path, codec: Path, video: tuple[tuple[str, Any], ...], dtype: torch.dtype, threads: int) -> tuple[Any, ...]:
    """Load the codec and prepare the reading of clips, once in each process."""
    torch.set_num_threads(threads)
    return load_codec(codec).to(choose_device()), ClipReader(clips, Video(**dict(video))), dtype


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in visible.split(",")][:count] if visible and count else [str(number) for number in range(count)]
