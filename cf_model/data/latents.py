"""Whole clips as latents, and their captions as embeddings: safetensors shards with an index.

index.json lists the clips in their order; a clip's number in that list is its row. A shard is two files, the latents of
some clips and the embeddings of their captions, both under the clips' ids and each of its own length: of an embedding,
the zeros past its text's end are left out. text.safetensors holds the empty text's and the null prompt's, whole. Reading
maps the files into memory and touches only what a window needs.
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
    empty, null = encode_text(["", negative]).to(dtype).unbind()  # first: what is wrong with the encoder shows before hours of video
    save_file({"empty": empty.contiguous(), "null": null.contiguous()}, folder / "text.safetensors")
    entries: list[dict[str, Any]] = []
    held: dict[str, Tensor] = {}
    size: list[int] = []

    def flush() -> None:
        if held:
            number, texts = entries[-1]["shard"], encode_text([entry["caption"] for entry in entries[-len(held) :]])
            save_file(held, folder / shard_name(number))
            save_file({name: trim_padding(rows).to(dtype) for name, rows in zip(held, texts, strict=True)}, folder / text_name(number))
            held.clear()

    for about, latents in clips:
        size = size or list(latents.shape[1:])
        if list(latents.shape[1:]) != size:
            raise ValueError(f"{about['id']} has latents of {list(latents.shape[1:])}, the clips before it of {size}; use one size")
        entries.append(dict(about) | {"frames": len(latents), "shard": len(entries) // shard})
        held[about["id"]] = latents.to("cpu", dtype).contiguous()
        if len(held) == shard:
            flush()
    flush()
    if not entries:
        raise ValueError(f"no clips to write to {folder}; the filter must keep at least one")
    about_all = {"clips": entries, "channels": size[0], "height": size[1], "width": size[2], "fps": fps}
    (folder / "index.json").write_text(json.dumps(about_all, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return entries


def trim_padding(rows: Float[Tensor, "T E"]) -> Float[Tensor, "T_ E"]:
    """Without the zeros past the end: at Wan's size they would be most of the file."""
    there = rows.any(dim=1).nonzero()
    return rows[: int(there.max()) + 1 if len(there) else 0].contiguous()


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def text_name(number: int) -> str:
    return f"text-{number:05d}.safetensors"


class Latents:
    """Reads what `write_latents` wrote. Rows are positions in `clips`; sampling them is the caller's."""

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
        """C, H, W."""
        return self.channels, self.height, self.width

    def rows(self, split: Split, at_least: int = 1) -> list[int]:
        """Clips of a split that have at least so many latent frames."""
        rows = [row for row, clip in enumerate(self.clips) if clip["split"] == split and clip["frames"] >= at_least]
        if not rows:
            rule = "use longer clips, or shorter windows in params.yaml"
            raise ValueError(f"{self.folder} has no {split} clip of {at_least} latent frames; {rule}")
        return rows

    def captions(self, rows: Rows) -> list[str]:
        return [self.clips[int(row)]["caption"] for row in rows]

    def frames(self, row: int) -> int:
        """Length of a clip in latent frames."""
        return int(self.clips[row]["frames"])

    def window(self, rows: Rows, starts: Rows, length: int) -> Float[Tensor, "B F C H W"]:
        """`length` latent frames of each of these clips, from these starts."""
        parts = []
        for row, start in zip(rows, starts, strict=True):
            clip, first = self.clips[int(row)], int(start)
            if not 0 <= first <= clip["frames"] - length:
                raise ValueError(f"{clip['id']} has {clip['frames']} latent frames, not {length} from {first} on; draw an earlier start")
            parts.append(self.opened(shard_name(clip["shard"])).get_slice(clip["id"])[first : first + length])
        return torch.stack(parts).float()

    def text(self, rows: Rows) -> Float[Tensor, "B T E"]:
        """Embeddings of these clips' captions."""
        found = torch.zeros(len(rows), *self.null_text.shape)
        for out, row in zip(found, rows, strict=True):
            clip = self.clips[int(row)]
            there = self.opened(text_name(clip["shard"])).get_tensor(clip["id"])
            out[: len(there)] = there
        return found

    @property
    def empty_text(self) -> Float[Tensor, "T E"]:
        """Takes a caption's place when training drops it."""
        return self._text("empty")

    @property
    def null_text(self) -> Float[Tensor, "T E"]:
        """What guidance moves away from: the negative prompt, which training must not teach as if it were no prompt."""
        return self._text("null")

    def _text(self, name: str) -> Tensor:
        found: Tensor = self.opened("text.safetensors").get_tensor(name)
        return found.float()
