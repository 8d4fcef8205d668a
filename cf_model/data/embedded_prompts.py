"""The prompts that students are trained on, as embeddings: safetensors shards, the texts, and an index.

A student's training needs no video, so it may have other prompts than the clips' captions, and many more of them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .latents import text_key, trim_padding
from .shards import ShardReader, ShardWriter


def write_prompts(
    folder: Path,
    prompts: Iterable[str],
    encode_text: Callable[[list[str]], Float[Tensor, "M T E"]],
    *,
    shard_mib: float,
    dtype: torch.dtype,
) -> int:
    """Embed the prompts as they come into shards of at most `shard_mib` MiB, and return their number.

    Beside the shards stand prompts.txt, one prompt a line, and index.json. The same prompts give the same bytes, also if a first call was
    killed and a second one goes on with its complete shards. Raises ValueError if there is no prompt.
    """
    writer = ShardWriter(folder, "text", shard_mib)
    size: list[int] = []
    count = 0
    with (folder / "prompts.txt").open("w", encoding="utf-8") as texts:
        for count, prompt in enumerate(prompts, 1):
            key = text_key(count - 1)
            if key not in writer.entries or not size:
                [embedded] = encode_text([prompt])
                size = list(embedded.shape)
            if key not in writer.entries:
                writer.add(key, trim_padding(embedded).to(dtype))
            texts.write(f"{prompt}\n")
    if not count:
        raise ValueError(f"no prompt to write to {folder}: all of them are held-out prompts; name a file that has others")
    shards = [len(list(group)) for _, group in groupby(entry["shard"] for entry in writer.entries.values())]
    writer.close()
    about = {"prompts": count, "shards": shards, "tokens": size[0], "channels": size[1]}  # shards: prompts of each
    (folder / "index.json").write_text(json.dumps(about, indent=1) + "\n")
    return count


class EmbeddedPrompts:
    """Reader of what `write_prompts` wrote: indexing by prompts' numbers gives [P, T, E]. It maps the files into memory."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.json").is_file():
            raise ValueError(f"{folder} has no index.json; run the stage prompts first")
        self.about: dict[str, Any] = json.loads((folder / "index.json").read_text())
        self.ends = list(accumulate(self.about["shards"]))  # of each shard, the number of the first prompt behind it
        self.texts = ShardReader(folder, "text")

    def __len__(self) -> int:
        return int(self.about["prompts"])

    def __getitem__(self, at: list[int]) -> Float[Tensor, "P T E"]:
        embeddings = torch.zeros(len(at), self.about["tokens"], self.about["channels"])
        for out, number in zip(embeddings, at, strict=True):
            tokens = self.texts.read(bisect_right(self.ends, number), text_key(number))
            out[: len(tokens)] = tokens
        return embeddings
