"""Codecs on disk: codec.json says which of the two kinds a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cf_model.codec.interface import Codec
from cf_model.codec.linear import LinearCodec
from cf_model.model.weights import fill_weights


def save_codec(codec: Codec, folder: Path) -> None:
    """Write codec.json and the weights: codec.safetensors of a linear codec, a diffusers folder of Wan's."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"kind": "wan", "channels": codec.channels}
    if isinstance(codec, LinearCodec):
        save_file({name: value.contiguous() for name, value in codec.state_dict().items()}, folder / "codec.safetensors")
        about = {"kind": "linear", "channels": codec.channels, "width": codec.width}
    else:
        from .wan_codec import WanCodec, save_wan_codec

        assert isinstance(codec, WanCodec)
        save_wan_codec(codec, folder)
    (folder / "codec.json").write_text(json.dumps(about) + "\n")


def load_codec(folder: Path) -> Codec:
    """Load what `save_codec` wrote; raises ValueError for any other folder."""
    file = folder / "codec.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no codec.json; run the stage codec first")
    about = json.loads(file.read_text())
    if about.get("kind") not in ("linear", "wan"):
        raise ValueError(f"{file} names the kind {about.get('kind')!r}; known are linear and wan")
    if about["kind"] == "wan":
        from .wan_codec import load_wan_codec  # diffusers takes seconds, which the small profiles need not wait

        return load_wan_codec(folder)
    codec = LinearCodec(about["channels"], about["width"])
    fill_weights(codec, folder / "codec.safetensors")
    return codec.eval()
