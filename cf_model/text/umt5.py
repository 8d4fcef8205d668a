"""UMT5, the text encoder of Wan: transformers' UMT5EncoderModel, fed as Wan's own code feeds it."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from cf_model.model.weights import check_safetensors_header, choose_precision, list_first_names


class UMT5Encoder:
    """UMT5 from a diffusers pipeline's text_encoder/ and tokenizer/. Its weights are loaded when a text is first encoded.

    Choice: on a GPU in bfloat16, as Wan's own code runs it (11 GB); on a CPU in float32 (23 GB). `load_dtype` overrides that.

    Wan pads every text to 512 tokens, masks the padding, and sets its rows to zero. Here each text is encoded alone at
    its own length: the same numbers, since UMT5 knows only distances between tokens, for a fraction of the arithmetic.
    """

    def __init__(self, folder: Path, tokens: int, channels: int, *, load_dtype: torch.dtype | None = None) -> None:
        self.folder, self.tokens, self.channels, self.load_dtype = folder, tokens, channels, load_dtype
        self.device = torch.device("cpu")
        # Choice: the file itself, not a tokenizer class of transformers, which may rebuild it by its own rules.
        self.tokenizer = open_tokenizer(folder / "tokenizer" / "tokenizer.json")
        home = folder / "text_encoder"
        if not (home / "config.json").is_file():
            raise ValueError(f"{home} holds no config.json; text.weights must name a folder with text_encoder/ and tokenizer/ inside")
        width = UMT5Config.from_pretrained(home, local_files_only=True).d_model
        if width != channels:
            raise ValueError(f"text.channels is {channels}, but {home} gives vectors of {width}; use {width}")
        for file in list_weight_files(home):
            check_safetensors_header(file)

    @cached_property
    def model(self) -> UMT5EncoderModel:
        """The loaded network; a ValueError names each weight that is missing, unknown or misshapen."""
        home = self.folder / "text_encoder"
        model, report = UMT5EncoderModel.from_pretrained(
            home,
            local_files_only=True,
            use_safetensors=True,
            dtype=self.load_dtype or choose_precision(self.device),
            ignore_mismatched_sizes=True,  # reported below, with all other misfits
            output_loading_info=True,
        )
        misfits = [f"has no {name}" for name in sorted(report["missing_keys"])]
        misfits += [f"has {name}, which a UMT5 encoder has not" for name in sorted(report["unexpected_keys"])]
        misfits += [f"has {name} of {list(theirs)}, not {list(ours)}" for name, theirs, ours in sorted(report["mismatched_keys"])]
        if misfits:
            raise ValueError(f"{home} {list_first_names(misfits)}; it belongs to other settings than those in the config.json beside it")
        return model.eval().requires_grad_(False)

    def to(self, device: Any) -> UMT5Encoder:
        self.device = torch.device(device)
        if "model" in self.__dict__:  # the cached property, if the weights are loaded
            self.model.to(self.device)
        return self

    def ids(self, text: str) -> list[int]:
        """Return the token ids of the uncut text; the last id marks its end."""
        return list(self.tokenizer.encode(clean_prompt(text)).ids)

    def length(self, text: str) -> int:
        return len(self.ids(text))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """Encode texts, each alone, as float32 on the CPU. The empty text is the token that ends a text, not zeros."""
        out = torch.zeros(len(texts), self.tokens, self.channels)
        model = self.model.to(self.device)
        for row, text in zip(out, texts, strict=True):
            ids = self.ids(text)
            if len(ids) > self.tokens:  # a longer text is cut, and still ends with the end token
                ids = [*ids[: self.tokens - 1], ids[-1]]
            row[: len(ids)] = model(torch.tensor([ids], device=self.device)).last_hidden_state[0].float().cpu()
        return out


def clean_prompt(text: str) -> str:
    """Mend broken characters, HTML entities and runs of spaces in a prompt, as diffusers' WanPipeline and Wan's own code do."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def open_tokenizer(file: Path) -> Tokenizer:
    """Open a tokenizer.json without the truncation and padding that it may store."""
    if not file.is_file():
        raise ValueError(f"{file} isn't there; text.weights must name a folder with text_encoder/ and tokenizer/tokenizer.json inside")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is no tokenizer ({error}); copy it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def list_weight_files(home: Path) -> list[Path]:
    """List a folder's weight files: the shards that its index names, or model.safetensors."""
    index = home / "model.safetensors.index.json"
    if not index.is_file():
        return [home / "model.safetensors"]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]}, which is no file beside it; copy the folder again")
    return [home / name for name in names]


def save_umt5(encoder: UMT5Encoder, folder: Path) -> None:
    """Copy the encoder's files as they are, so that no precision is lost and nothing has to be loaded."""
    home = encoder.folder / "text_encoder"
    index = home / "model.safetensors.index.json"
    files = [home / "config.json", *list_weight_files(home), *([index] if index.is_file() else [])]
    for file in [*files, encoder.folder / "tokenizer" / "tokenizer.json"]:
        copy = folder / file.relative_to(encoder.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
