"""Training checkpoints: a folder of safetensors with a manifest. Never pickle, never half a checkpoint.

step-XXXXXXXX/ holds one file for each part of the state that has tensors, and manifest.json: the step, the rest of the
state, and every file's size and SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CHECKPOINTS_TO_KEEP = 2  # the newest, and the one before in case the newest is damaged
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the parts' state_dicts to `step-XXXXXXXX` and remove older checkpoints beyond CHECKPOINTS_TO_KEEP; returns the folder."""
    path = folder / f"step-{step:08d}"
    with refuse_full_disk(folder, path.name):
        write_checkpoint(path, step, state)
    for old in sorted(folder.glob("step-????????"))[:-CHECKPOINTS_TO_KEEP]:
        # renamed first, so that a kill now leaves nothing that looks like a damaged checkpoint
        shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
    return path


def write_checkpoint(path: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write one checkpoint under a temporary name and rename it when its bytes are on the disk."""
    # left by a save that was killed
    for rest in path.parent.glob("*.partial"):
        if rest.is_dir():
            shutil.rmtree(rest)
    partial = path.with_name(path.name + ".partial")
    partial.mkdir()
    # tensors of each part go to a file of its own, all other values to the manifest
    files: dict[str, dict[str, Any]] = {}
    skeleton: dict[str, Any] = {}
    for name, part in state.items():
        tensors: dict[str, torch.Tensor] = {}
        skeleton[name] = _flatten_state(part, name, tensors)
        if tensors:
            file = partial / f"{name}.safetensors"
            save_file(tensors, file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _hash_file(file)}
            _sync_to_disk(file)
    manifest = partial / "manifest.json"
    manifest.write_text(json.dumps({"step": step, "files": files, "state": skeleton}) + "\n")
    _sync_to_disk(manifest)
    # the new name appears only after all bytes are on the disk, and the folder's entry follows
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync_to_disk(path.parent)


def find_newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the newest undamaged checkpoint and its step; None and 0 when there is none. Warns of each damaged one."""
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            return path, int(verify_checkpoint(path)["step"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path.name} can't be used ({error}); trying the checkpoint before it", stacklevel=2)
    return None, 0


def load_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Load each part's state from a checkpoint that `find_newest_checkpoint` returned."""
    skeleton = json.loads((path / "manifest.json").read_text())["state"]
    for name, part in state.items():
        part.load_state_dict(_unflatten_state(skeleton[name], _read_tensors(path / f"{name}.safetensors")))


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest; raise ValueError if a file is missing or differs from the manifest's size or SHA-256."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes, the manifest says {expected['bytes']}")
        if _hash_file(file) != expected["sha256"]:
            raise ValueError(f"{name} is not what was written: its SHA-256 differs from the manifest's")
    return manifest


@contextmanager
def refuse_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Turn a full disk while `what` is written into one sentence, and leave the checkpoints before as they were."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (reason := explain_full_disk(error)) is None:
            raise
        for rest in folder.glob("*.partial"):
            shutil.rmtree(rest, ignore_errors=True)
        last = max((path.name for path in folder.glob("step-????????")), default="none yet")
        free = shutil.disk_usage(folder).free / 2**20
        problem = f"{folder} has no room for {what} ({reason}; {free:.0f} MiB are free)"
        raise ValueError(f"{problem}; the last checkpoint, {last}, is intact: make room and start again") from None


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _flatten_state(value: Any, at: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move each tensor of a nested state to `tensors`, leaving its name in place, and return what is left as JSON.

    Dictionaries become lists of pairs, because JSON would turn their keys to text.
    """
    if isinstance(value, torch.Tensor):
        tensors[at] = value.detach().cpu().contiguous().clone()
        return {"tensor": at}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten_state(item, f"{at}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten_state(item, f"{at}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _unflatten_state(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `_flatten_state`."""
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten_state(item, tensors) for key, item in content}
    if kind == "list":
        return [_unflatten_state(item, tensors) for item in content]
    return content


def explain_full_disk(error: BaseException) -> str | None:
    """Return the system's words for an error that means a full disk, None for another error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):
        # it has no error number of its own, only the system's words
        number = int((re.findall(r"os error (\d+)", str(error)) or [0])[-1])
    return os.strerror(number) if number in DISK_FULL_ERRORS else None
