"""Whole clips as latents, and their captions as embeddings: safetensors shards with an index.

index.json lists the clips in their order; a clip's number in that list is its row. A shard holds the latents of some
clips under their ids, so clips of any lengths share one; text.safetensors holds one embedding for each different
caption, the empty text's and the null prompt's. Reading maps the files into memory and touches only what a window needs.
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
    entries: list[dict[str, Any]] = []
    captions: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size: list[int] = []

    def flush() -> None:
        if held:
            save_file(held, folder / shard_name(entries[-1]["shard"]))
            held.clear()

    for about, latents in clips:
        size = size or list(latents.shape[1:])
        if list(latents.shape[1:]) != size:
            raise ValueError(f"{about['id']} has latents of {list(latents.shape[1:])}, the clips before it of {size}; use one size")
        row = captions.setdefault(about["caption"], len(captions))
        entries.append(dict(about) | {"frames": len(latents), "shard": len(entries) // shard, "text": row})
        held[about["id"]] = latents.to(dtype).contiguous()
        if len(held) == shard:
            flush()
    flush()
    if not entries:
        raise ValueError(f"no clips to write to {folder}; the filter must keep at least one")
    text = encode_text([*captions, "", negative]).to(dtype)
    table = {"embeddings": text[:-2], "empty": text[-2], "null": text[-1]}
    save_file({name: value.contiguous() for name, value in table.items()}, folder / "text.safetensors")
    about_all = {"clips": entries, "channels": size[0], "height": size[1], "width": size[2], "fps": fps}
    (folder / "index.json").write_text(json.dumps(about_all, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return entries


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


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
        table = self.opened("text.safetensors").get_slice("embeddings")
        return torch.stack([table[self.clips[int(row)]["text"]] for row in rows]).float()

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
