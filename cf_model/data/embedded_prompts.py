"""The prompts that students are trained on, as embeddings: safetensors shards, the texts, and an index.

A student's training needs no video, so it may have other prompts than the clips' captions, and many more of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .latents import text_name, trim_padding


def write_prompts(
    folder: Path, prompts: Iterable[str], encode_text: Callable[[list[str]], Float[Tensor, "M T E"]], *, shard: int, dtype: torch.dtype
) -> int:
    """Embed the prompts as they come, `shard` of them to a file, and return their number.

    Beside the shards stand prompts.txt, one prompt a line, and index.json. The same prompts give the same bytes.
    Raises ValueError if there is no prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, size = 0, [0, 0]
    with (folder / "prompts.txt").open("w", encoding="utf-8") as texts:
        for number, part in enumerate(split_shards(prompts, shard)):
            embedded = encode_text(part)
            size = list(embedded.shape[1:])
            rows = {f"{count + row:08d}": trim_padding(tokens).to(dtype) for row, tokens in enumerate(embedded)}
            save_file(rows, folder / text_name(number))
            texts.writelines(f"{prompt}\n" for prompt in part)
            count += len(part)
    if not count:
        raise ValueError(f"no prompt to write to {folder}: all of them are held-out prompts; name a file that has others")
    about = {"prompts": count, "shard": shard, "tokens": size[0], "channels": size[1]}
    (folder / "index.json").write_text(json.dumps(about, indent=1) + "\n")
    return count


def split_shards(prompts: Iterable[str], shard: int) -> Iterator[list[str]]:
    """Yield the prompts in lists of `shard`, the last one shorter."""
    rest = iter(prompts)
    while part := list(islice(rest, shard)):
        yield part


class EmbeddedPrompts:
    """Reader of what `write_prompts` wrote: indexing by prompts' numbers gives [P, T, E]. It maps the files into memory."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.json").is_file():
            raise ValueError(f"{folder} has no index.json; run the stage prompts first")
        self.about: dict[str, int] = json.loads((folder / "index.json").read_text())
        self.opened = cache(lambda name: safe_open(folder / name, framework="pt"))

    def __len__(self) -> int:
        return self.about["prompts"]

    def __getitem__(self, at: list[int]) -> Float[Tensor, "P T E"]:
        embeddings = torch.zeros(len(at), self.about["tokens"], self.about["channels"])
        for out, number in zip(embeddings, at, strict=True):
            tokens = self.opened(text_name(number // self.about["shard"])).get_tensor(f"{number:08d}")
            out[: len(tokens)] = tokens
        return embeddings
