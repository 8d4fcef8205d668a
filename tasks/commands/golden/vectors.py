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
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import MemorySpec
from cf_model.model.weights import check_weights
from tasks.params.yaml_file import Refused

WEIGHTS = "weights_selfforcing_keys.safetensors"
KEYMAP = "keymap_selfforcing_to_diffusers.json"
DEFAULT_CHUNK = 3  # where no input says it
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


class GoldenVectors:
    """Arrays are read when asked for and checked for their shape; what was never asked for is known at the end."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise Refused(f"{folder} isn't a folder; name one with vectors in the format of tests/golden/wan-causal")
        self.folder = folder
        self.files: dict[str, tuple[Path, Any]] = {}  # array -> where it is
        self.read: set[str] = set()
        for path in sorted(folder.glob("*.npz")):
            try:
                file = np.load(path, allow_pickle=False)
            except UNREADABLE as error:
                raise Refused(f"{path} can't be read ({error}); copy it again") from None
            self.files |= dict.fromkeys(file.files, (path, file))
        if not self.files:
            raise Refused(f"{folder} holds no .npz file, so there is nothing to check; name a folder like tests/golden/wan-causal")
        self.config = self._config()

    # ----------------------------------------------------------------------------------------------------- settings

    def _config(self) -> dict[str, Any]:
        for path in sorted(self.folder.glob("meta_*.json")):
            config = self._json(path.name).get("config")
            if isinstance(config, dict):
                return config
        raise Refused(f"{self.folder} holds no meta_*.json with a config, which states the model's sizes; copy meta_selfforcing.json too")

    def _json(self, name: str) -> dict[str, Any]:
        path = self._there(name)
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise Refused(f"{path} is not JSON ({error}); copy it again") from None
        if not isinstance(found, dict):
            raise Refused(f"{path} holds no keys; copy it again")
        return found

    def _there(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise Refused(f"{self.folder / name} isn't there; copy the folder as a whole")
        return self.folder / name

    def size(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise Refused(f"{key} is {value} in the config of {self.folder}/meta_*.json; it is a whole number above 0")
        return value

    @property
    def chunk(self) -> int:
        """Latent frames made together."""
        if "causal.clean0" in self.files:
            return self.video("causal.clean0", 1).shape[1]
        if "roll.renoise0" in self.files:
            return len(self.array("roll.renoise0", None, None, None, None))
        return DEFAULT_CHUNK

    # ------------------------------------------------------------------------------------------------------- arrays

    def names(self, pattern: str) -> list[str]:
        """Of the arrays whose whole name matches, in the order of their numbers."""
        found = [name for name in self.files if re.fullmatch(pattern, name)]
        return sorted(found, key=lambda name: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)])

    def count(self, pattern: str) -> int:
        """One more than the highest number that the pattern's group finds: a gap is then an array that isn't there."""
        return max((int(found[1]) for name in self.files if (found := re.fullmatch(pattern, name))), default=-1) + 1

    def array(self, name: str, *shape: int | None) -> Tensor:
        """Refused unless its shape fits; None stands for a size that the array itself says."""
        if name not in self.files:
            raise Refused(f"array {name} is in no .npz file of {self.folder}, and others there need it; copy the folder as a whole")
        path, file = self.files[name]
        try:
            value = torch.from_numpy(file[name])
        except (*UNREADABLE, TypeError) as error:
            raise Refused(f"array {name} of {path} can't be read ({error}); copy the file again") from None
        if value.ndim != len(shape) or any(want not in (None, has) for want, has in zip(shape, value.shape, strict=True)):
            wanted = ", ".join("*" if size is None else str(size) for size in shape)
            raise Refused(f"array {name} of {path} has shape {list(value.shape)}, and only [{wanted}] fits the model and the other arrays")
        self.read.add(name)
        return value

    def video(self, name: str, batch: int | None, frames: int | None = None) -> Tensor:
        """An input of the model: stored [B, C, F, H, W], ours are [B, F, C, H, W]."""
        stated = self.config.get("H"), self.config.get("W")
        return self.array(name, batch, self.size("in_dim"), frames, *stated).float().transpose(1, 2)

    def text(self, batch: int) -> Tensor:
        """Of the first videos; cases of one video use row 0."""
        rows = self.array("text.padded", None, self.config.get("text_len"), self.size("text_dim")).float()
        if len(rows) < batch:
            raise Refused(f"array text.padded of {self.files['text.padded'][0]} has {len(rows)} rows for {batch} videos; copy it again")
        return rows[:batch]

    def unread(self) -> list[str]:
        return sorted(self.files.keys() - self.read)

    # ------------------------------------------------------------------------------------------------------ weights

    def weights(self) -> dict[str, Tensor]:
        """As stored, under Self-Forcing's names."""
        path = self._there(WEIGHTS)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} can't be read ({error}); copy it again") from None

    def keymap(self) -> dict[str, Any]:
        return self._json(KEYMAP)

    def model(self) -> Denoiser:
        """Through our converter, strictly."""
        sizes = translate_original_config(self.config) | {"patch_size": tuple(self.config.get("patch_size", (1, 2, 2)))}
        try:
            weights = to_diffusers(self.weights())
            check_weights(weights, expected_shapes(sizes))
        except ValueError as error:
            raise Refused(f"{self.folder / WEIGHTS} is not the model of meta_*.json's config: {error}") from None
        transformer = WanTransformer3DModel.from_config(sizes)
        transformer.load_state_dict(weights, strict=True)
        return Denoiser(transformer).eval().requires_grad_(False)


def build_peer_memory(case: str, frames: int) -> MemorySpec:
    """A peer's window and sink as a memory: Self-Forcing's and LongLive's positions are absolute, LongLive's relative ones packed.

    The window counts the current chunk and the sink; a sink shorter than a chunk takes the chunk's first frames and leaves
    the others to the window.
    """
    found = re.fullmatch(r"(causal|roll|ll_abs|ll_rel)_(?:global|w(\d+)_s(\d+))(_per_frame_t)?", case)
    if not found:
        raise Refused(f"case {case} names neither a global window nor one like w6_s3, which says what is remembered; rename its arrays")
    window, sink = (int(found[2]), int(found[3])) if found[2] else (frames, 0)
    return MemorySpec(
        sink=sink,
        slow=0,
        fast=window - sink,
        promote="none",
        tau=0.0,
        interval=1,
        begin=1,
        keep="first",
        when="evict",
        timing="clean",
        fill="none",
        scope="global",
        positions="packed" if found[1] == "ll_rel" else "absolute",
        commit="all",
    )
