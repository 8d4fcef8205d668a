"""Files of weights as others write them: folders, shards, pickled dictionaries, and the wrappers around every name."""

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
# parts of names that FSDP, checkpointing, compile, DDP, peft, DiffSynth and ComfyUI put before a name or into the middle of it
WRAPPERS = {
    *("model", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"),
    *("base_model", "pipe", "dit", "diffusion_model", "transformer"),
}
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class SourceWeights:
    """What lies in the files of one path, wrappers stripped, names otherwise as they are."""

    path: Path
    state: dict[str, Tensor]
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    stripped: tuple[str, ...] = ()
    container: dict[str, Any] = field(default_factory=dict)  # its key, the branch, and which there were

    def facts(self) -> dict[str, Any]:
        names = "diffusers" if is_diffusers(self.state) else "original Wan"
        layout = "Self-Forcing" if self.container else names
        sources = [{"name": file.name, "bytes": file.stat().st_size, "sha256": _hash_file(file)} for file in self.files]
        said = {"source": self.path.name, "layout": layout, "names": names}
        return said | self.container | {"stripped": list(self.stripped), "files": sources}


def open_source(src: Path, branch: Branch | None = None) -> SourceWeights:
    """Finds the files in what was named, reads them, and takes off what is wrapped around the weights."""
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
    """The folder that may hold a config, and the files with the weights: one, or the shards of an index."""
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
        found = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(found) == 1:
            return folder, (found[0],)
        if found:
            raise ValueError(f"{folder} holds {list_first_names([file.name for file in found])}; name the one to import")
    raise ValueError(f"{folder} holds no weights; known are .safetensors, {', '.join(PICKLED)}")


def read_safetensors(files: tuple[Path, ...]) -> dict[str, Any]:
    """One file, or all shards of one model."""
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
    """Tensors and plain containers only: nothing else in a pickle is ever built, so nothing in it can run."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "Python objects"
        raise ValueError(f"{file} holds {what} besides tensors, which could run code and is not read; use a file of weights") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError):
        raise ValueError(f"{file} is truncated, damaged, or in the format of torch before 1.6; fetch it again, or save it anew") from None


def unpack_branch(tree: Any, file: Path, branch: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of one branch: a trainer's file holds the student raw and averaged, and its critic."""
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{file} holds no dictionary of weights; import a state_dict")
    there = {name: [key for key in keys if isinstance(tree.get(key), Mapping)] for name, keys in CONTAINERS.items()}
    known = [name for name, keys in there.items() if keys]
    if not known and any(isinstance(value, Mapping) for value in tree.values()):
        keys = ", ".join(key for keys in CONTAINERS.values() for key in keys)
        raise ValueError(f"{file} holds {list_first_names(tree)} and none of {keys}; save the weights alone")
    if branch is not None and branch not in known:
        raise ValueError(f"--branch is {branch}, but {file} holds {', '.join(known) or 'no branches'}; choose what is there")
    if not known:
        return dict(tree), {}
    # Choice: the average, as all of them evaluate with; but a LoRA was trained last and has none.
    first = ("raw", "ema") if "generator_lora" in there["raw"] else ("ema", "raw")
    chosen = branch or next((name for name in first if name in known), "critic")
    if branch is None and chosen == "critic":
        raise ValueError(f"{file} holds a critic only; --branch critic imports it")
    weights = {name: value for key in there[chosen] for name, value in tree[key].items()}
    return weights, {"container": " + ".join(there[chosen]), "branch": chosen, "branches": known}


def strip_wrappers(tree: Mapping[str, Tensor], src: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Without the wrappers, wherever in a name they stand and however often; no name of a weight has such a part."""
    state, found = {}, set()
    for name, tensor in tree.items():
        parts = name.split(".")
        plain = ".".join(part for part in parts if part not in WRAPPERS)
        if plain in state:
            raise ValueError(f"{src} holds {plain} twice, under different wrappers; save one set of weights alone")
        state[plain] = tensor
        found |= WRAPPERS.intersection(parts)
    return state, tuple(sorted(found))


def read_transformer_config(folder: Path, asked: bool) -> dict[str, Any] | None:
    """diffusers' config of the folder, if it states one; `asked` when the folder itself was named, and must then fit."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    stated = _read_json(file)
    match stated.get("_class_name"):
        case "WanTransformer3DModel":
            return {key: value for key, value in stated.items() if not key.startswith("_")}
        case "WanModel" | "CausalWanModel":
            return translate_original_config(stated)
    if asked:
        raise ValueError(f"{file} describes {stated.get('_class_name')}, not Wan's transformer (WanTransformer3DModel or WanModel)")
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object; fetch it again")
    return found


def _hash_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
