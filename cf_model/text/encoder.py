"""Prompts as vectors: the protocol of a text encoder, and the small profiles' encoder, which needs no weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WORD = re.compile(r"\w+|[^\w\s]")
POSITION_WEIGHT = 0.5  # of the vector of a word's position, beside the vector of the word

TextKind = Literal["words", "umt5"]


class TextEncoder(Protocol):
    """Text encoder as the stages use it. Rows past a text's end are zero; texts that are encoded together don't affect each other."""

    tokens: int  # of a text; what is longer is cut
    channels: int

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """Encode texts; the vectors are on the CPU, whatever device the encoder is on."""
        ...

    def length(self, text: str) -> int:
        """Count a text's tokens before it is cut: if there are more than `tokens`, its end would be lost."""
        ...

    def to(self, device: Any) -> TextEncoder: ...


class WordEncoder:
    """Stand-in for UMT5 in the small profiles: a fixed random vector for every word, and zeros past a text's end.

    Any word has a vector, also a word that is in no caption. Two different words are nearly orthogonal.
    """

    def __init__(self, tokens: int, channels: int) -> None:
        self.tokens, self.channels = tokens, channels

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """Encode texts word by word. The empty text is all zeros: the null prompt of guidance."""
        out = np.zeros((len(texts), self.tokens, self.channels), np.float32)
        for row, text in zip(out, texts, strict=True):
            # Choice: a longer text is cut, as Wan's tokenizer cuts at 512 tokens.
            for i, word in enumerate(WORD.findall(text.lower())[: self.tokens]):
                row[i] = draw_word_vector(f"word {word}", self.channels) + POSITION_WEIGHT * draw_word_vector(f"place {i}", self.channels)
        return torch.from_numpy(out)

    def length(self, text: str) -> int:
        return len(WORD.findall(text.lower()))

    def to(self, device: Any) -> WordEncoder:
        return self


@lru_cache(maxsize=10_000)
def draw_word_vector(name: str, channels: int) -> np.ndarray:
    """Draw normal numbers seeded by a name: the same in every process and on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    values: np.ndarray = np.random.default_rng(seed).standard_normal(channels, np.float32)
    values.flags.writeable = False
    return values


def build_text_encoder(
    kind: TextKind, folder: Path | None, tokens: int, channels: int, *, load_dtype: torch.dtype | None = None
) -> TextEncoder:
    """Build the encoder of a kind. `folder` and `load_dtype` are of UMT5's weights, whose width `channels` must be."""
    if kind == "words":
        return WordEncoder(tokens, channels)
    if folder is None:
        raise ValueError("text.kind is umt5, but text.weights is null; name a folder with text_encoder/ and tokenizer/ inside")
    from .umt5 import UMT5Encoder  # transformers takes seconds, which the small profiles need not wait

    return UMT5Encoder(folder, tokens, channels, load_dtype=load_dtype)


def save_text_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Write text.json, which says the kind, and beside it UMT5's weights and tokenizer, as in a diffusers pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"kind": "umt5", "tokens": encoder.tokens, "channels": encoder.channels}
    if isinstance(encoder, WordEncoder):
        about["kind"] = "words"
    else:
        from .umt5 import UMT5Encoder, save_umt5

        assert isinstance(encoder, UMT5Encoder)
        save_umt5(encoder, folder)
    (folder / "text.json").write_text(json.dumps(about) + "\n")


def load_text_encoder(folder: Path, *, load_dtype: torch.dtype | None = None) -> TextEncoder:
    """Load what `save_text_encoder` wrote; raises ValueError for any other folder."""
    if not (folder / "text.json").is_file():
        raise ValueError(f"{folder} holds no text.json, so it names no text encoder; name a folder that has one")
    about = json.loads((folder / "text.json").read_text())
    if about.get("kind") not in ("words", "umt5"):
        raise ValueError(f"{folder / 'text.json'} names the kind {about.get('kind')!r}; known are words and umt5")
    return build_text_encoder(about["kind"], folder, about["tokens"], about["channels"], load_dtype=load_dtype)
