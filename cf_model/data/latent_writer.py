"""Writing of clips as latents, and their captions as embeddings, in the layout that latents.py reads.

Memory does not grow with the number of clips: what is known of each lies in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from jaxtyping import Float
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor

from .latents import COLUMNS, INDEX, text_key, trim_padding
from .scratch import ScratchMap
from .shard_writer import ShardWriter

GROUP = 1024  # rows of the index that are in memory at once, and together in its file


@dataclass(frozen=True)
class IndexEntries:
    """The index's rows, and the facts of each clip that were given with its latents; they can be read several times."""

    clips: Iterable[dict[str, Any]]
    captions: ScratchMap  # caption -> its number
    texts: ShardWriter
    videos: ShardWriter

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for clip in self.clips:
            facts, number = self.videos.entries[clip["id"]], self.captions[clip["caption"]]
            entry = {name: clip[name] for name in ("id", "caption", "split")} | facts
            shard = self.texts.entries[text_key(number)]["shard"]
            yield entry | {"frames": facts["shape"][0], "caption_id": number, "text_shard": shard}


def write_latents(
    folder: Path,
    clips: Iterable[dict[str, Any]],
    encode_clip: Callable[[dict[str, Any]], tuple[Float[Tensor, "F C H W"], dict[str, Any]]],
    encode_text: Callable[[list[str]], Float[Tensor, "M T E"]],
    *,
    shard_mib: float,
    dtype: torch.dtype,
    fps: float,
    negative: str,
) -> IndexEntries:
    """Encode the clips (id, caption, split) in their order into shards of at most `shard_mib` MiB; return the index's entries.

    `clips` is read several times, as a list can be.
    `encode_clip` gives a clip's latents and facts to keep with them, of which `md5` goes into the index. `negative` is the null prompt of
    guidance. The same input gives the same bytes, also if a first call was killed and a second one goes on with its complete shards.
    """
    if next(iter(clips), None) is None:
        raise ValueError(f"no clips to write to {folder}; the filter must keep at least one")
    folder.mkdir(parents=True, exist_ok=True)
    # All texts come before any clip, so that a fault of the text encoder shows before hours of video.
    empty, null = encode_text(["", negative]).to(dtype).unbind()
    save_file({"empty": empty.contiguous(), "null": null.contiguous()}, folder / "text.safetensors")
    texts = ShardWriter(folder, "text", shard_mib)
    captions = ScratchMap(folder.parent)
    for clip in clips:
        if (caption := clip["caption"]) not in captions:
            captions[caption] = number = len(captions)
            if text_key(number) not in texts.entries:
                texts.add(text_key(number), trim_padding(encode_text([caption])[0]).to(dtype))
    videos = ShardWriter(folder, "latents", shard_mib)
    size: list[int] = []
    for clip in clips:
        if clip["id"] not in videos.entries:
            latents, facts = encode_clip(clip)
            videos.add(clip["id"], latents.to(dtype), **facts, shape=list(latents.shape))
        shape = videos.entries[clip["id"]]["shape"][1:]
        size = size or shape
        if shape != size:
            raise ValueError(f"{clip['id']} has latents of {shape}, the clips before it of {size}; use one size")
    texts.close()
    videos.close()
    about = {"channels": size[0], "height": size[1], "width": size[2], "fps": fps}
    schema = pyarrow.schema(COLUMNS, metadata={name: str(value) for name, value in about.items()})
    entries = IndexEntries(clips, captions, texts, videos)
    with parquet.ParquetWriter(folder / INDEX, schema) as file:
        rows = iter(entries)
        while group := list(islice(rows, GROUP)):
            file.write_table(pyarrow.Table.from_pylist(group, schema))
    return entries


def join_parts(parts: Iterable[Float[Tensor, "_ C H W"]]) -> Float[Tensor, "F C H W"]:
    """Join a clip's latents as they come, in a buffer that doubles when it is full. Raises ValueError if none comes.

    A list of the parts would be as large, but each part would stay between the freed pixels of two pieces of video: the heap (of
    glibc) is then full of holes, and grows with a clip's pixels.
    """
    buffer, count = torch.empty(0), 0
    for part in parts:
        end = count + len(part)
        if end > len(buffer):
            larger = part.new_empty(2 * end, *part.shape[1:])
            if count:
                larger[:count] = buffer[:count]
            buffer = larger
        buffer[count:end] = part
        count = end
    if not count:
        raise ValueError("a clip gave no latents; it has no frame that can be read")
    return buffer[:count].clone()


def sum_latents(latents: Float[Tensor, "F C H W"]) -> Float[Tensor, "2"]:
    """Return the sum of a clip's numbers and of their squares, before they are rounded to the dtype that is stored."""
    wide = latents.double()
    return torch.stack([wide.sum(), wide.square().sum()])


def summarize_entries(entries: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Count clips, latents and distinct captions, and return mean and deviation of all numbers; entries have `count`, `sum`, `square`."""
    total, square, count = (sum(entry[name] for entry in entries) for name in ("sum", "square", "count"))
    mean = total / count
    return {
        "clips": sum(1 for _ in entries),
        "frames": sum(entry["frames"] for entry in entries),
        "captions": 1 + max(entry["caption_id"] for entry in entries),
        "mean": mean,
        "std": max(0.0, square / count - mean**2) ** 0.5,
    }
