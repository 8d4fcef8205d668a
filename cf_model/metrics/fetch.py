"""Fetching of the networks that metrics are made with, by pinned revision, with the sha256 of every file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from .encoders import PINNED, RECORD, check_record, hash_file, keep_as_safetensors

FILES = ("config.json", "tokenizer.json", "model.safetensors")  # what is needed of a repository, as far as it has them
PICKLED = "pytorch_model.bin"  # taken where there is no model.safetensors, read as tensors alone, and kept as safetensors


def fetch_role(role: str, folder: Path) -> str:
    """Fetch the network of a role into a new folder and return a line about it; a folder that is there is checked instead.

    Raises ValueError for another folder, and for what was not fetched or came damaged.
    """
    pinned = PINNED[role]
    if folder.exists():
        if not check_record(folder):
            raise ValueError(f"{folder} is there and was not fetched by this command; name another --out, or remove it")
        return f"{folder}: already there, every file as it was fetched"
    try:
        info = huggingface_hub.HfApi().model_info(pinned.repository, revision=pinned.revision, files_metadata=True)
        listed: dict[str, Any] = {file.rfilename: file for file in info.siblings or []}
        wanted = [name for name in FILES if name in listed] + ([] if FILES[-1] in listed else [PICKLED])
        source = Path(huggingface_hub.snapshot_download(pinned.repository, revision=pinned.revision, allow_patterns=wanted))
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"{pinned.repository}@{pinned.revision} was not fetched ({reason}); try again where there is a network") from None
    for name in wanted:
        stated = listed[name].lfs.sha256 if name in listed and listed[name].lfs else None
        if not (source / name).is_file() or (stated and hash_file(source / name) != stated):
            raise ValueError(f"{name} of {pinned.repository} came damaged; remove {source} and fetch it again")
    part = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in wanted:
        if name == PICKLED:
            keep_as_safetensors(source / name, part / FILES[-1])
        else:
            shutil.copyfile(source / name, part / name)
    digests = {file.name: hash_file(file) for file in sorted(part.iterdir())}
    record = {"repository": pinned.repository, "revision": pinned.revision, "sha256": digests}
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    part.replace(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return f"{folder}: {pinned.repository}@{pinned.revision[:12]}, {pinned.licence}, {size:.0f} MB"
