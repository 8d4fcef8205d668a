"""A folder of golden vectors in the format of tests/golden/wan-causal/README.md: arrays by name, settings, weights."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cf_model.foreign.weight_names import expected_shapes, to_diffusers, translate_original_config
from cf_model.model.context import build_plain_spec
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import MemorySpec
from cf_model.model.weights import check_weights

WEIGHTS = "weights_selfforcing_keys.safetensors"
KEYMAP = "keymap_selfforcing_to_diffusers.json"
DEFAULT_CHUNK = 3  # latent frames, where no input says it
UNREADABLE = (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


class BrokenVectors(ValueError):
    """A folder of golden vectors that can't be checked: the message names the file or array, the rule and the way out."""


class GoldenVectors:
    """The arrays of a folder, each checked for its shape when it is needed; `list_unread` names the rest."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BrokenVectors(f"{folder} isn't a folder; name one with vectors in the format of tests/golden/wan-causal")
        self.folder = folder
        self.arrays: dict[str, tuple[Path, Tensor]] = {}  # by name, with the file that each is in
        self.read_names: set[str] = set()
        for path in sorted(folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    self.arrays |= {name: (path, torch.from_numpy(file[name])) for name in file.files}
            except UNREADABLE as error:
                raise BrokenVectors(f"{path} can't be read ({error}); copy it again") from None
        if not self.arrays:
            raise BrokenVectors(f"{folder} holds no .npz file, so there is nothing to check; name a folder like tests/golden/wan-causal")
        self.config = self._read_config()

    def _read_config(self) -> dict[str, Any]:
        for path in sorted(self.folder.glob("meta_*.json")):
            config = read_object(path).get("config")
            if isinstance(config, dict):
                return config
        raise BrokenVectors(f"{self.folder} holds no meta_*.json with a config of the model's sizes; copy meta_selfforcing.json too")

    def find_file(self, name: str) -> Path:
        """Return a file of the folder; refuse a folder that lacks it."""
        if not (self.folder / name).is_file():
            raise BrokenVectors(f"{self.folder / name} isn't there; copy the folder as a whole")
        return self.folder / name

    def read_size(self, key: str) -> int:
        """Return a size of the model's config, a whole number above 0."""
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise BrokenVectors(f"{key} is {value} in the config of {self.folder}/meta_*.json; it is a whole number above 0")
        return value

    @property
    def chunk(self) -> int:
        """Number of latent frames made together, as the shape of an input says."""
        if "causal.clean0" in self.arrays:
            return self.read_video("causal.clean0", 1).shape[1]
        if "roll.renoise0" in self.arrays:
            return len(self.read_array("roll.renoise0", None, None, None, None))
        return DEFAULT_CHUNK

    def find_names(self, pattern: str) -> list[str]:
        """List the arrays whose whole name matches, in the order of the numbers in their names."""
        names = [name for name in self.arrays if re.fullmatch(pattern, name)]
        return sorted(names, key=lambda name: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)])

    def count_arrays(self, pattern: str) -> int:
        """Return one more than the highest number in the pattern's group, so that a gap in the numbers is a missing array."""
        return max((int(match[1]) for name in self.arrays if (match := re.fullmatch(pattern, name))), default=-1) + 1

    def read_array(self, name: str, *shape: int | None) -> Tensor:
        """Read an array and refuse it unless its shape is `shape`, in which None fits any size."""
        if name not in self.arrays:
            raise BrokenVectors(f"array {name} is in no .npz file of {self.folder}, and others there need it; copy the folder as a whole")
        path, value = self.arrays[name]
        if value.ndim != len(shape) or any(want not in (None, has) for want, has in zip(shape, value.shape, strict=True)):
            wanted = ", ".join("*" if size is None else str(size) for size in shape)
            raise BrokenVectors(f"array {name} of {path} has shape {list(value.shape)}, and only [{wanted}] fits the model and the others")
        self.read_names.add(name)
        return value.clone()

    def read_video(self, name: str, batch: int | None, frames: int | None = None) -> Tensor:
        """Read an input of the model, stored as [B, C, F, H, W], as [B, F, C, H, W]."""
        area = self.config.get("H"), self.config.get("W")
        return self.read_array(name, batch, self.read_size("in_dim"), frames, *area).float().transpose(1, 2)

    def read_text(self, batch: int) -> Tensor:
        """Read the text embeddings [B, L, D] of the first `batch` videos; cases of one video use row 0."""
        rows = self.read_array("text.padded", None, self.config.get("text_len"), self.read_size("text_dim")).float()
        if len(rows) < batch:
            raise BrokenVectors(f"array text.padded of {self.arrays['text.padded'][0]} has {len(rows)} rows for {batch} videos; copy it")
        return rows[:batch]

    def list_unread(self) -> list[str]:
        """List the arrays that no case has read."""
        return sorted(self.arrays.keys() - self.read_names)

    def load_weights(self) -> dict[str, Tensor]:
        """Load the weights under Self-Forcing's names, as they are stored."""
        path = self.find_file(WEIGHTS)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BrokenVectors(f"{path} can't be read ({error}); copy it again") from None

    def load_model(self) -> Denoiser:
        """Build the model from the weights through our converter; refuse weights that are missing, unknown or misshapen."""
        sizes = translate_original_config(self.config) | {"patch_size": tuple(self.config.get("patch_size", (1, 2, 2)))}
        try:
            weights = to_diffusers(self.load_weights())
            check_weights(weights, expected_shapes(sizes))
        except ValueError as error:
            raise BrokenVectors(f"{self.folder / WEIGHTS} is not the model of meta_*.json's config: {error}") from None
        transformer = WanTransformer3DModel.from_config(sizes)
        transformer.load_state_dict(weights, strict=True)
        return Denoiser(transformer).eval().requires_grad_(False)


def read_object(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file of the folder; refuse what is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenVectors(f"{path} is damaged ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise BrokenVectors(f"{path} is damaged: it holds no names; copy it again")
    return values


def build_peer_memory(case: str, frames: int) -> MemorySpec:
    """Return the memory with the window and sink of a case such as ll_rel_w6_s3. Positions are packed for ll_rel, else absolute.

    The window counts the current chunk and the sink; a sink shorter than a chunk takes the chunk's first frames and leaves
    the others to the window.
    """
    match = re.fullmatch(r"(causal|roll|ll_abs|ll_rel)_(?:global|w(\d+)_s(\d+))(_per_frame_t)?", case)
    if not match:
        raise BrokenVectors(f"case {case} names neither a global window nor one like w6_s3, which says what is seen; rename its arrays")
    window, sink = (int(match[2]), int(match[3])) if match[2] else (frames, 0)
    return build_plain_spec(sink, window - sink, "packed" if match[1] == "ll_rel" else "absolute")
