"""Clips as latents, and their captions as embeddings: safetensors shards with an index.

index.json lists the clips in their order; a clip's number in that list is its row. A shard is two files, the latents of
some clips and the embeddings of their captions, both under the clips' ids and each of its own length: of an embedding,
the zeros past its text's end are left out. text.safetensors holds the embeddings of the empty text and of the null
prompt, with their zeros. Reading maps the files into memory and touches only what a window needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Split = Literal["train", "heldout"]
Rows = Sequence[int] | Int[Tensor, " B"]


def write_latents(
    folder: Path,
    clips: Iterable[tuple[dict[str, str], Float[Tensor, "F C H W"]]],
    encode_text: Callable[[list[str]], Float[Tensor, "M T E"]],
    *,
    shard: int,
    dtype: torch.dtype,
    fps: float,
    negative: str,
) -> list[dict[str, Any]]:
    """Write the clips as they come, `shard` of them to a file, and return the index's entries.

    With each clip come its id, caption and split; `negative` is the null prompt of guidance. The same input gives the same
    bytes: no file has metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # before any clip, so that a fault of the text encoder shows before hours of video
    empty, null = encode_text(["", negative]).to(dtype).unbind()
    save_file({"empty": empty.contiguous(), "null": null.contiguous()}, folder / "text.safetensors")
    entries: list[dict[str, Any]] = []
    shard_latents: dict[str, Tensor] = {}
    size: list[int] = []

    def flush_shard() -> None:
        if shard_latents:
            number = entries[-1]["shard"]
            texts = encode_text([entry["caption"] for entry in entries[-len(shard_latents) :]])
            save_file(shard_latents, folder / shard_name(number))
            embeddings = {name: trim_padding(rows).to(dtype) for name, rows in zip(shard_latents, texts, strict=True)}
            save_file(embeddings, folder / text_name(number))
            shard_latents.clear()

    for about, latents in clips:
        size = size or list(latents.shape[1:])
        if list(latents.shape[1:]) != size:
            raise ValueError(f"{about['id']} has latents of {list(latents.shape[1:])}, the clips before it of {size}; use one size")
        entries.append(dict(about) | {"frames": len(latents), "shard": len(entries) // shard})
        shard_latents[about["id"]] = latents.to("cpu", dtype).contiguous()
        if len(shard_latents) == shard:
            flush_shard()
    flush_shard()
    if not entries:
        raise ValueError(f"no clips to write to {folder}; the filter must keep at least one")
    about_all = {"clips": entries, "channels": size[0], "height": size[1], "width": size[2], "fps": fps}
    (folder / "index.json").write_text(json.dumps(about_all, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return entries


def trim_padding(rows: Float[Tensor, "T E"]) -> Float[Tensor, "T_ E"]:
    """Cut off the zeros past a text's end, because at Wan's size they would be most of the file."""
    filled = rows.any(dim=1).nonzero()
    return rows[: int(filled.max()) + 1 if len(filled) else 0].contiguous()


def shard_name(number: int) -> str:
    """Return the file name of a shard's latents."""
    return f"latents-{number:05d}.safetensors"


def text_name(number: int) -> str:
    """Return the file name of a shard's caption embeddings."""
    return f"text-{number:05d}.safetensors"


class Latents:
    """Reader of what `write_latents` wrote. A row is a clip's place in `clips`; callers draw rows and starts."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.json").is_file():
            raise ValueError(f"{folder} has no index.json; run the stage encode first")
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.clips: list[dict[str, Any]] = index["clips"]
        self.channels, self.height, self.width = index["channels"], index["height"], index["width"]
        self.fps: float = index["fps"]
        self.opened = cache(lambda name: safe_open(folder / name, framework="pt"))

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
            parts.append(self.opened(shard_name(clip["shard"])).get_slice(clip["id"])[first : first + length])
        return torch.stack(parts).float()

    def text(self, rows: Rows) -> Float[Tensor, "B T E"]:
        """Read the embeddings of these clips' captions, with zeros past each text's end."""
        embeddings = torch.zeros(len(rows), *self.null_text.shape)
        for out, row in zip(embeddings, rows, strict=True):
            clip = self.clips[int(row)]
            tokens = self.opened(text_name(clip["shard"])).get_tensor(clip["id"])
            out[: len(tokens)] = tokens
        return embeddings

    @property
    def empty_text(self) -> Float[Tensor, "T E"]:
        """The embedding that takes a caption's place when training drops the caption."""
        return self._text("empty")

    @property
    def null_text(self) -> Float[Tensor, "T E"]:
        """The negative prompt's embedding, which guidance moves away from; training must not teach it as the absence of a prompt."""
        return self._text("null")

    def _text(self, name: str) -> Tensor:
        embedding: Tensor = self.opened("text.safetensors").get_tensor(name)
        return embedding.float()
