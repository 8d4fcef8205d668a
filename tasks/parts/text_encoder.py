"""The text encoder that params.text names."""

from cf_model.text import encoder
from cf_model.text.encoder import TextEncoder
from tasks.params.schema import Text

from .hub import resolve_weights


def open_text_encoder(spec: Text) -> TextEncoder:
    """Open the encoder and check its files. UMT5's 11 GB are loaded when the first text is encoded."""
    folder = None if spec.kind == "words" else resolve_weights("text.weights", spec.weights, ("text_encoder", "tokenizer"))
    return encoder.build_text_encoder(spec.kind, folder, spec.tokens, spec.channels)
