"""Writing of the students' prompts as embeddings, in the layout that embedded_prompts.py reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .latents import text_key, trim_padding
from .shard_writer import ShardWriter


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
