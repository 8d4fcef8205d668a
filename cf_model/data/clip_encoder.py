"""Clips to latents, each encoded once: by one process a GPU, on a cluster, or here."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.device import choose_device

from .clip_pool import ClipPool, PayloadCache
from .clip_reader import ClipReader, Decoder
from .latent_writer import join_parts, sum_latents
from .subprocess_reader import Unreadable

LONGEST = 86_400.0  # seconds that one clip may take to be encoded; its file may pause for less (clip_reader.py)
MODULES = tuple(
    f"cf_model.{name}" for name in ("codec.interface", "data.clip_encoder", "data.clip_reader", "data.decord_reader", "data.video_reader")
)


class Clip(NamedTuple):
    """A row of the manifest on its way to an encoder."""

    name: str  # of its file
    row: Mapping[str, Any]


class ClipEncoder:
    """Encoder of clips, one a GPU or one here, with a cache: a clip that was encoded before is read back.

    `video`: height, width and fps; `compute_md5` gives the md5 of a clip's file; `cluster` is the address of a Dask scheduler;
    `decoder` is tried first (clip_reader.py).
    """

    def __init__(
        self,
        clips: Path,
        codec: Path,
        video: Mapping[str, Any],
        dtype: torch.dtype,
        *,
        cache: PayloadCache,
        compute_md5: Callable[[Path], str],
        cluster: str | None = None,
        decoder: Decoder = "pyav",
    ) -> None:
        self.clips, self.dtype, self.cache, self.compute_md5, self.cluster = clips, dtype, cache, compute_md5, cluster
        self.settings = (clips.absolute(), codec.absolute(), tuple(video.items()), dtype, decoder, torch.get_num_threads())
        self.task = partial(encode_clip, settings=self.settings, exact=torch.are_deterministic_algorithms_enabled())

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], tuple[Tensor, dict[str, Any]]]]:
        """Yield each clip's row, and its latents [F, C, H, W] as they are stored with its file's md5, and count, sum and sum of squares
        before rounding. Raises ValueError for a clip that can't be read. `rows` is read twice, as a list can be.
        """
        gpus, md5s = list_gpus(), deque[str]()

        def list_contents() -> Iterator[tuple[str, Clip]]:
            """Yield what each clip's latents depend on, and the clip; its md5 waits in `md5s` for its latents."""
            for row in rows:
                md5s.append(self.compute_md5(self.clips / row["file"]))
                yield f"{md5s[-1]} {row.get('start')} {row.get('length')}", Clip(row["file"], row)

        each_its_own = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
        pool = ClipPool(len(gpus) if len(gpus) > 1 else 0, LONGEST, self.cluster, each_its_own)
        payloads = pool.compute_payloads(self.cache, list_contents(), self.task)
        for row, payload in zip(rows, payloads, strict=True):
            md5 = md5s.popleft()
            if isinstance(payload, Unreadable):
                raise ValueError(payload.sentence)
            entry = load(payload)
            total, square = entry["sums"].tolist()
            facts = {"md5": md5, "count": entry["latents"].numel(), "sum": total, "square": square}
            yield row, (entry["latents"], facts | {"by_decord": bool(entry["by_decord"])})

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
    by_decord = torch.tensor(reader.delivered == "decord")
    return save({"latents": latents.to(dtype).contiguous(), "sums": sum_latents(latents), "by_decord": by_decord})


@lru_cache(maxsize=1)
def open_encoder(
    clips: Path, codec: Path, video: tuple[tuple[str, Any], ...], dtype: torch.dtype, decoder: Decoder, threads: int
) -> tuple[Any, ...]:
    """Load the codec and prepare the reading of clips, once in each process."""
    torch.set_num_threads(threads)
    return load_codec(codec).to(choose_device()), ClipReader(clips, dict(video), decoder), dtype


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in visible.split(",")][:count] if visible and count else [str(number) for number in range(count)]
