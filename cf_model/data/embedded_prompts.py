"""The prompts that students are trained on, as embeddings: safetensors shards, the texts, and an index.

A student's training needs no video, so it may have other prompts than the clips' captions, and many more of them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .latents import text_key
from .shards import ShardReader


class EmbeddedPrompts:
    """Reader of what write_prompts wrote: indexing by prompts' numbers gives [P, T, E]. It maps the files into memory."""

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
