"""Clips as latents, and their captions as embeddings: safetensors shards with an index.

index.parquet has a row for each clip, in their order, by the columns of `COLUMNS`; a clip's number in it is its row, and the schema's
metadata has the size of a latent. The shards `latents` hold the clips, each of its own length, by id; the shards `text` hold the
embedding of each distinct caption once, by the caption's number, without the zeros past its text's end. text.safetensors holds the
embeddings of the empty text and of the null prompt, with their zeros. Reading maps the files into memory and touches only what a window
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow
import torch
from jaxtyping import Float, Int
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .shards import ShardReader, ShardWriter

Split = Literal["train", "heldout"]
Rows = Sequence[int] | Int[Tensor, " B"]
COLUMNS = {
    "id": pyarrow.string(),
    "split": pyarrow.string(),  # train or heldout
    "frames": pyarrow.int32(),  # latents of the clip
    "shard": pyarrow.int32(),  # of the clip's latents
    "md5": pyarrow.string(),  # of the video file that the latents were made of
    "caption": pyarrow.string(),
    "caption_id": pyarrow.int32(),  # the caption's number among the distinct ones
    "text_shard": pyarrow.int32(),  # of the caption's embedding
}
INDEX = "index.parquet"


def write_latents(
    folder: Path,
    clips: Sequence[dict[str, Any]],
    encode_clip: Callable[[dict[str, Any]], tuple[Float[Tensor, "F C H W"], dict[str, Any]]],
    encode_text: Callable[[list[str]], Float[Tensor, "M T E"]],
    *,
    shard_mib: float,
    dtype: torch.dtype,
    fps: float,
    negative: str,
) -> list[dict[str, Any]]:
    """Encode the clips (id, caption, split) in their order into shards of at most `shard_mib` MiB; return the index's entries.

    `encode_clip` gives a clip's latents and facts to keep with them, of which `md5` goes into the index. `negative` is the null prompt of
    guidance. The same input gives the same bytes, also if a first call was killed and a second one goes on with its complete shards.
    """
    if not clips:
        raise ValueError(f"no clips to write to {folder}; the filter must keep at least one")
    folder.mkdir(parents=True, exist_ok=True)
    # All texts come before any clip, so that a fault of the text encoder shows before hours of video.
    empty, null = encode_text(["", negative]).to(dtype).unbind()
    save_file({"empty": empty.contiguous(), "null": null.contiguous()}, folder / "text.safetensors")
    texts = ShardWriter(folder, "text", shard_mib)
    captions = {caption: number for number, caption in enumerate(dict.fromkeys(clip["caption"] for clip in clips))}
    for caption, number in captions.items():
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
    entries = []
    for clip in clips:
        facts, number = videos.entries[clip["id"]], captions[clip["caption"]]
        entry = {name: clip[name] for name in ("id", "caption", "split")} | facts | {"frames": facts["shape"][0], "caption_id": number}
        entries.append(entry | {"text_shard": texts.entries[text_key(number)]["shard"]})
    texts.close()
    videos.close()
    about = {"channels": size[0], "height": size[1], "width": size[2], "fps": fps}
    schema = pyarrow.schema(COLUMNS, metadata={name: str(value) for name, value in about.items()})
    parquet.write_table(pyarrow.Table.from_pylist(entries, schema), folder / INDEX)
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


def summarize_entries(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Count clips, latents and distinct captions, and return mean and deviation of all numbers; entries have `count`, `sum`, `square`."""
    total, square, count = (sum(entry[name] for entry in entries) for name in ("sum", "square", "count"))
    mean = total / count
    return {
        "clips": len(entries),
        "frames": sum(entry["frames"] for entry in entries),
        "captions": len({entry["caption"] for entry in entries}),
        "mean": mean,
        "std": max(0.0, square / count - mean**2) ** 0.5,
    }


def text_key(number: int) -> str:
    """Return the name of a distinct text's embedding in its shard."""
    return f"{number:08d}"


def trim_padding(rows: Float[Tensor, "T E"]) -> Float[Tensor, "T_ E"]:
    """Cut off the zeros past a text's end, because at Wan's size they would be most of the file."""
    filled = rows.any(dim=1).nonzero()
    return rows[: int(filled.max()) + 1 if len(filled) else 0].contiguous()


class Latents:
    """Reader of what `write_latents` wrote. A row is a clip's place in `clips`; callers draw rows and starts."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} has no {INDEX}; run the stage encode first")
        table = parquet.read_table(folder / INDEX, use_threads=False, memory_map=True)
        about = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        self.folder = folder
        self.clips: list[dict[str, Any]] = table.to_pylist()
        self.channels, self.height, self.width = (int(about[name]) for name in ("channels", "height", "width"))
        self.fps = float(about["fps"])
        self.latents, self.texts = ShardReader(folder, "latents"), ShardReader(folder, "text")
        self.own_texts = cache(lambda: safe_open(folder / "text.safetensors", framework="pt"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of a latent."""
        return self.channels, self.height, self.width

    def rows(self, split: Split, at_least: int = 1) -> list[int]:
        """Return the rows of a split's clips that have at least so many latent frames; raises ValueError if there are none."""
        rows = [row for row, clip in enumerate(self.clips) if clip["split"] == split and clip["frames"] >= at_least]
        if not rows:
            rule = "use longer clips, or shorter windows in params.yaml"
            raise ValueError(f"{self.folder} has no {split} clip of {at_least} latent frames; {rule}")
        return rows

    def captions(self, rows: Rows) -> list[str]:
        """Return these clips' captions."""
        return [self.clips[int(row)]["caption"] for row in rows]

    def frames(self, row: int) -> int:
        """Return a clip's length in latent frames."""
        return int(self.clips[row]["frames"])

    def window(self, rows: Rows, starts: Rows, length: int) -> Float[Tensor, "B F C H W"]:
        """Read `length` latent frames of each of these clips, from these starts on, as float32."""
        parts = []
        for row, start in zip(rows, starts, strict=True):
            clip, first = self.clips[int(row)], int(start)
            if not 0 <= first <= clip["frames"] - length:
                raise ValueError(f"{clip['id']} has {clip['frames']} latent frames, not {length} from {first} on; draw an earlier start")
            parts.append(self.latents.read_part(clip["shard"], clip["id"], first, length))
        return torch.stack(parts).float()

    def text(self, rows: Rows) -> Float[Tensor, "B T E"]:
        """Read the embeddings of these clips' captions, with zeros past each text's end."""
        embeddings = torch.zeros(len(rows), *self.null_text.shape)
        for out, row in zip(embeddings, rows, strict=True):
            clip = self.clips[int(row)]
            tokens = self.texts.read(clip["text_shard"], text_key(clip["caption_id"]))
            out[: len(tokens)] = tokens
        return embeddings

    @property
    def empty_text(self) -> Float[Tensor, "T E"]:
        """The embedding that takes a caption's place when training drops the caption."""
        return self._read_own_text("empty")

    @property
    def null_text(self) -> Float[Tensor, "T E"]:
        """The negative prompt's embedding, which guidance moves away from; training must not teach it as the absence of a prompt."""
        return self._read_own_text("null")

    def _read_own_text(self, name: str) -> Tensor:
        embedding: Tensor = self.own_texts().get_tensor(name)
        return embedding.float()
