"""Captions and prompts as embeddings, each computed once and kept beside the outs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from cf_model.data.latents import trim_padding

from .encoder import TextEncoder


class TextCache(Protocol):
    """Embeddings of earlier runs, by their texts."""

    def get(self, content: str) -> bytes | None: ...
    def put(self, content: str, payload: bytes) -> None: ...


class CaptionEncoder:
    """Encoder of texts, one at a time, so that a text's numbers don't depend on the texts beside it."""

    def __init__(self, encoder: TextEncoder, cache: TextCache) -> None:
        self.encoder, self.cache = encoder, cache

    def encode(self, texts: list[str]) -> Float[Tensor, "B T E"]:
        """Encode texts, with zeros past each text's end."""
        encoded = []
        for text in texts:
            if payload := self.cache.get(text):
                rows = load(payload)["text"]
            else:
                rows = trim_padding(self.encoder.encode([text])[0])
                self.cache.put(text, save({"text": rows}))
            encoded.append(functional.pad(rows, (0, 0, 0, self.encoder.tokens - len(rows))))
        return torch.stack(encoded)


def list_encoder_files(folder: Path | None) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of the encoder's files, by which a change is noticed.

    # Choice: not their bytes, of which UMT5 has 11 GB.
    """
    for part in ("text_encoder", "tokenizer") if folder else ():
        for file in sorted((folder or Path()).joinpath(part).iterdir()):
            yield f"{part}/{file.name}", file.stat().st_size, file.stat().st_mtime_ns
