"""Prompts as vectors. In the small profiles a fixed random vector for every word there is, so nothing has to be learnt or downloaded."""

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
POSITION_WEIGHT = 0.5  # weight of a position's vector beside a word's

TextKind = Literal["words", "umt5"]


class TextEncoder(Protocol):
    """What the stages know of an encoder. Rows past a text's end are zero; a text's vectors don't depend on those beside it."""

    tokens: int  # of a text; what is longer is cut
    channels: int

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """On the CPU, whatever device the encoder is on."""
        ...

    def length(self, text: str) -> int:
        """Tokens that a text has before it is cut: more than `tokens` means that its end would be lost."""
        ...

    def to(self, device: Any) -> TextEncoder: ...


class WordEncoder:
    """Stands in for UMT5 in the small profiles: same shapes, same meaning of rows past the end (zeros).

    Any word has a vector, also one that no clip was captioned with. Two different words are nearly orthogonal.
    """

    def __init__(self, tokens: int, channels: int) -> None:
        self.tokens, self.channels = tokens, channels

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """The empty text is all zeros: the null prompt of guidance."""
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
    """Normal numbers seeded by a name: the same in every process and on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    values: np.ndarray = np.random.default_rng(seed).standard_normal(channels, np.float32)
    values.flags.writeable = False
    return values


def build_text_encoder(kind: TextKind, folder: Path | None, tokens: int, channels: int, *, load_dtype: torch.dtype | None = None) -> TextEncoder:
    """The one place that chooses. `folder` and `load_dtype` are of UMT5's weights; `channels` must be what they give."""
    if kind == "words":
        return WordEncoder(tokens, channels)
    if folder is None:
        raise ValueError("text.kind is umt5, but text.weights is null; name a folder with text_encoder/ and tokenizer/ inside")
    from .umt5 import UMT5Encoder  # transformers takes seconds, which the small profiles need not wait

    return UMT5Encoder(folder, tokens, channels, load_dtype=load_dtype)


def save_text_encoder(encoder: TextEncoder, folder: Path) -> None:
    """text.json says which of the two it is; UMT5's weights and tokenizer lie beside it, as in a diffusers pipeline."""
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
    """What `save_text` wrote."""
    if not (folder / "text.json").is_file():
        raise ValueError(f"{folder} holds no text.json, so it names no text encoder; name a folder that has one")
    about = json.loads((folder / "text.json").read_text())
    if about.get("kind") not in ("words", "umt5"):
        raise ValueError(f"{folder / 'text.json'} names the kind {about.get('kind')!r}; known are words and umt5")
    return build_text_encoder(about["kind"], folder, about["tokens"], about["channels"], load_dtype=load_dtype)
