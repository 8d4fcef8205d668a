"""Clips as latents, and their captions as embeddings: safetensors shards with an index.

index.parquet has a row for each clip, in their order, by the columns of `COLUMNS`; a clip's number in it is its row, and the schema's
metadata has the size of a latent. The shards `latents` hold the clips, each of its own length, by id; the shards `text` hold the
embedding of each distinct caption once, by the caption's number, without the zeros past its text's end. text.safetensors holds the
embeddings of the empty text and of the null prompt, with their zeros. Reading maps the files into memory and touches only what a window
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow
import torch
from jaxtyping import Float, Int
from pyarrow import parquet
from safetensors import safe_open
from torch import Tensor

from .shards import ShardReader

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


def text_key(number: int) -> str:
    """Return the name of a distinct text's embedding in its shard."""
    return f"{number:08d}"


def trim_padding(rows: Float[Tensor, "T E"]) -> Float[Tensor, "T_ E"]:
    """Cut off the zeros past a text's end, because at Wan's size they would be most of the file."""
    filled = rows.any(dim=1).nonzero()
    return rows[: int(filled.max()) + 1 if len(filled) else 0].contiguous()


class Latents:
    """Reader of what write_latents (latent_writer.py) wrote. A row is a clip's place in `clips`; callers draw rows and starts."""

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
