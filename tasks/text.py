"""The text encoder that params.text names."""

from __future__ import annotations

from cf_model.model import text
from cf_model.model.text import TextEncoder

from .params import Text
from .weights import local


def text_encoder(spec: Text) -> TextEncoder:
    """UMT5's 11 GB are not loaded before the first text is encoded; everything else is checked here."""
    folder = None if spec.kind == "words" else local("text.weights", spec.weights, ("text_encoder", "tokenizer"))
    return text.text_encoder(spec.kind, folder, spec.tokens, spec.channels)
