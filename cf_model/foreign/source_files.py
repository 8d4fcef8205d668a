"""Weight files of other projects: folders, shards and pickled dictionaries, without the wrappers around the names.

Nothing in a pickle is built but tensors and plain containers, so nothing in a foreign file can run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cf_model.model.weights import WEIGHTS, list_first_names

from .weight_names import is_diffusers, translate_original_config

Branch = Literal["ema", "raw", "critic"]
CONTAINERS = {"ema": ("generator_ema",), "raw": ("generator", "generator_lora"), "critic": ("critic", "critic_lora")}
# parts that FSDP, checkpointing, compile, DDP, peft, DiffSynth and ComfyUI put before a weight's name or into the middle of it
WRAPPERS = {
    *("model", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"),
    *("base_model", "pipe", "dit", "diffusion_model", "transformer"),
}
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class SourceWeights:
    """Weights in the files of one path, without wrappers and otherwise under the names of their project."""

    path: Path
    state: dict[str, Tensor]
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    stripped: tuple[str, ...] = ()
    container: dict[str, Any] = field(default_factory=dict)  # the key in a trainer's file, the branch, and all branches in it

    def facts(self) -> dict[str, Any]:
        """Return what import.json says of the source: layout, container, wrappers, and each file's size and SHA-256."""
        names = "diffusers" if is_diffusers(self.state) else "original Wan"
        layout = "Self-Forcing" if self.container else names
        sources = [{"name": file.name, "bytes": file.stat().st_size, "sha256": _hash_file(file)} for file in self.files]
        facts = {"source": self.path.name, "layout": layout, "names": names}
        return facts | self.container | {"stripped": list(self.stripped), "files": sources}


def open_source(src: Path, branch: Branch | None = None) -> SourceWeights:
    """Find and read the weight files of a file or folder, and strip the wrappers from the weights' names.

    `branch` chooses among the sets of weights in a trainer's file. Raises ValueError for anything but tensors.
    """
    folder, files = find_weight_files(src)
    pickled = files[0].suffix in PICKLED
    if pickled:
        tree, container = unpack_branch(read_pickled(files[0]), files[0], branch)
    else:
        tree, container = read_safetensors(files), {}
        if branch is not None:
            raise ValueError(f"--branch is {branch}, but {src} holds one set of weights and no branches; leave the option out")
    wrong = [name for name, value in tree.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{src} holds {list_first_names(wrong)} among the weights, which are no tensors; import a file of weights alone")
    state, stripped = strip_wrappers(tree, src)
    adapter = _read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    return SourceWeights(src, state, files, read_transformer_config(folder, src.is_dir()), adapter, stripped, container)


def find_weight_files(src: Path) -> tuple[Path, tuple[Path, ...]]:
    """Return the folder that may hold a config, and the weight files: a single file, or the shards of an index."""
    if src.is_file():
        if src.suffix not in (".safetensors", *PICKLED):
            raise ValueError(f"{src} is no file of weights; known are .safetensors, {', '.join(PICKLED)}, and folders with one of them")
        return src.parent, (src,)
    if not src.is_dir():
        raise ValueError(f"{src} isn't there; nothing is downloaded here, so fetch it first and state the file or the folder")
    folder = src / "transformer" if (src / "transformer").is_dir() else src  # of a pipeline
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        lost = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if lost or not names:
            raise ValueError(f"{index} names {list_first_names(lost) or 'no file'}, which is not in the folder; fetch the missing shards")
        return folder, tuple(folder / name for name in names)
    if (folder / WEIGHTS).is_file():
        return folder, (folder / WEIGHTS,)
    for suffixes in ((".safetensors",), PICKLED):
        candidates = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(candidates) == 1:
            return folder, (candidates[0],)
        if candidates:
            raise ValueError(f"{folder} holds {list_first_names([file.name for file in candidates])}; name the one to import")
    raise ValueError(f"{folder} holds no weights; known are .safetensors, {', '.join(PICKLED)}")


def read_safetensors(files: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file, or all shards of a model."""
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            part = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); fetch it again") from None
        if twice := state.keys() & part.keys():
            raise ValueError(f"{file} holds {list_first_names(twice)} a second time; the shards don't belong together")
        state |= part
    return state


def read_pickled(file: Path) -> Any:
    """Read tensors and plain containers; anything else in the pickle raises ValueError and is never built, so it cannot run."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = match[1] if match else "Python objects"
        raise ValueError(f"{file} holds {what} besides tensors, which could run code and is not read; use a file of weights") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError):
        raise ValueError(f"{file} is truncated, damaged, or in the format of torch before 1.6; fetch it again, or save it anew") from None


def unpack_branch(tree: Any, file: Path, branch: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of one branch, and what to report of the file: a trainer's holds the student, its average and its critic."""
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{file} holds no dictionary of weights; import a state_dict")
    present = {name: [key for key in keys if isinstance(tree.get(key), Mapping)] for name, keys in CONTAINERS.items()}
    branches = [name for name, keys in present.items() if keys]
    if not branches and any(isinstance(value, Mapping) for value in tree.values()):
        keys = ", ".join(key for keys in CONTAINERS.values() for key in keys)
        raise ValueError(f"{file} holds {list_first_names(tree)} and none of {keys}; save the weights alone")
    if branch is not None and branch not in branches:
        raise ValueError(f"--branch is {branch}, but {file} holds {', '.join(branches) or 'no branches'}; choose what is there")
    if not branches:
        return dict(tree), {}
    # Choice: the average, as all of them evaluate with; but a LoRA was trained last and has none.
    first = ("raw", "ema") if "generator_lora" in present["raw"] else ("ema", "raw")
    chosen = branch or next((name for name in first if name in branches), "critic")
    if branch is None and chosen == "critic":
        raise ValueError(f"{file} holds a critic only; --branch critic imports it")
    weights = {name: value for key in present[chosen] for name, value in tree[key].items()}
    return weights, {"container": " + ".join(present[chosen]), "branch": chosen, "branches": branches}


def strip_wrappers(tree: Mapping[str, Tensor], src: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights without wrappers, wherever in a name they stand and however often, and the wrappers that were there."""
    state, wrappers = {}, set()
    for name, tensor in tree.items():
        parts = name.split(".")
        plain = ".".join(part for part in parts if part not in WRAPPERS)
        if plain in state:
            raise ValueError(f"{src} holds {plain} twice, under different wrappers; save one set of weights alone")
        state[plain] = tensor
        wrappers |= WRAPPERS.intersection(parts)
    return state, tuple(sorted(wrappers))


def read_transformer_config(folder: Path, required: bool) -> dict[str, Any] | None:
    """Return the folder's config in diffusers' words; None if there is none.

    Another model's config raises ValueError if `required`, that is if the folder itself was named.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = _read_json(file)
    match config.get("_class_name"):
        case "WanTransformer3DModel":
            return {key: value for key, value in config.items() if not key.startswith("_")}
        case "WanModel" | "CausalWanModel":
            return translate_original_config(config)
    if required:
        raise ValueError(f"{file} describes {config.get('_class_name')}, not Wan's transformer (WanTransformer3DModel or WanModel)")
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; fetch it again")
    return content


def _hash_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
