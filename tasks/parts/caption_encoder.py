"""Captions and prompts as embeddings, each computed once and kept beside the outs."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors.torch import load, save
from torch import Tensor

from cf_model.data.latents import trim_padding
from cf_model.text.encoder import TextEncoder
from tasks.params.schema import Text

from .clip_cache import ClipCache
from .device import choose_device
from .text_encoder import open_text_encoder


class CaptionEncoder:
    """Encoder of texts, one at a time, so that a text's numbers don't depend on the texts beside it; `cache` names what it keeps."""

    def __init__(self, spec: Text, cache: str) -> None:
        self.encoder: TextEncoder = open_text_encoder(spec).to(choose_device())
        files = list(list_encoder_files(getattr(self.encoder, "folder", None)))
        about = spec.model_dump(exclude={"negative"}) | {"files": files, "device": choose_device().type}
        modules = (type(self.encoder).__module__, "tasks.parts.caption_encoder", "tasks.parts.text_encoder")
        self.cache = ClipCache(cache, about, modules=modules, libraries=("torch", "transformers"))

    def encode(self, texts: list[str]) -> Tensor:
        """Encode texts to [B, T, E], with zeros past each text's end."""
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
