"""Prompts as vectors: a fixed random vector for every word there is, so nothing has to be learnt or downloaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WORD = re.compile(r"\w+|[^\w\s]")
PLACE = 0.5  # weight of a position's vector beside a word's


class TextEncoder(Protocol):
    tokens: int
    channels: int

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]: ...

    def length(self, text: str) -> int: ...


class WordEncoder:
    """Stands in for UMT5 in the small profiles: same shapes, same meaning of rows past the end (zeros).

    Any word has a vector, also one that no clip was captioned with. Two different words are nearly orthogonal.
    """

    def __init__(self, tokens: int, channels: int) -> None:
        self.tokens, self.channels = tokens, channels

    def length(self, text: str) -> int:
        return len(WORD.findall(text.lower()))

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """The empty text is all zeros: the null prompt of guidance."""
        out = np.zeros((len(texts), self.tokens, self.channels), np.float32)
        for row, text in zip(out, texts, strict=True):
            # Choice: a longer text is cut, as Wan's tokenizer cuts at 512 tokens.
            for i, word in enumerate(WORD.findall(text.lower())[: self.tokens]):
                row[i] = vector(f"word {word}", self.channels) + PLACE * vector(f"place {i}", self.channels)
        return torch.from_numpy(out)


@lru_cache(maxsize=10_000)
def vector(name: str, channels: int) -> np.ndarray:
    """Normal numbers seeded by a name: the same in every process and on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    values: np.ndarray = np.random.default_rng(seed).standard_normal(channels, np.float32)
    values.flags.writeable = False
    return values


def save_text(text: TextEncoder, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.json").write_text(json.dumps({"kind": "words", "tokens": text.tokens, "channels": text.channels}) + "\n")


def load_text(folder: Path) -> TextEncoder:
    sizes = json.loads((folder / "text.json").read_text())
    return WordEncoder(sizes["tokens"], sizes["channels"])
