"""The encoder of captions and prompts, with what it has encoded before."""

from cf_model.device import choose_device
from cf_model.text.caption_encoder import CaptionEncoder, list_encoder_files
from tasks.params.schema import Text

from .clip_cache import ClipCache
from .text_encoder import open_text_encoder


def open_caption_encoder(spec: Text, name: str) -> tuple[CaptionEncoder, ClipCache]:
    """Open the encoder that params.text names, and its cache, which is called `name`."""
    encoder = open_text_encoder(spec).to(choose_device())
    files = list(list_encoder_files(getattr(encoder, "folder", None)))
    about = spec.model_dump(exclude={"negative"}) | {"files": files, "device": choose_device().type}
    modules = (type(encoder).__module__, "cf_model.text.caption_encoder", "tasks.parts.text_encoder")
    cache = ClipCache(name, about, modules=modules, libraries=("torch", "transformers"))
    return CaptionEncoder(encoder, cache), cache
