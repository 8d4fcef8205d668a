"""Weights that a parameter names: a local folder, or a repository on the Hugging Face Hub, of which the needed parts are fetched."""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tasks.files.words import count_things
from tasks.params.yaml_file import Refused

REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # owner/name, or owner/name@revision


def resolve_weights(key: str, weights: str | None, parts: Sequence[str]) -> Path:
    """Return the folder that has these parts of a diffusers pipeline; announces a download on stderr before it starts.

    The Hub's own settings hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN. An owner/name@revision never changes.
    """
    if weights is None:
        raise Refused(f"{key} is null; name a folder in the diffusers layout, or a repository such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    named = REPOSITORY.fullmatch(weights)
    if not named:
        raise Refused(f"{key} is {weights}, which is no folder here; name one in the diffusers layout, or a repository as owner/name")
    from huggingface_hub import constants, errors, snapshot_download

    name, revision = named.groups()
    files = [f"{part}/{kind}" for part in parts for kind in ("*.json", "*.safetensors")]
    try:
        with suppress(errors.DryRunError):  # the Hub can't be asked: what was fetched before will do
            listed = snapshot_download(name, revision=revision, allow_patterns=files, dry_run=True)
            fetched = [file.file_size or 0 for file in listed if file.will_download]
            if fetched:
                what = f"{count_things(len(fetched), 'file')}, {sum(fetched) / 1e9:.2f} GB, of {name} ({', '.join(parts)})"
                print(f"{key}: downloading {what} from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}", file=sys.stderr, flush=True)
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        way = "name a folder in the diffusers layout, or fetch it where there is a network"
        raise Refused(f"{key} is {weights}, no folder here, and the Hub did not give it ({reason}); {way}") from None
