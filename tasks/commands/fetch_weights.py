"""`cf fetch-weights`: the networks that the papers' metrics are made with, by pinned revision, with the sha256 of every file."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from tasks.files.json_lines import write_json
from tasks.params.yaml_file import Refused

FILES = ("config.json", "tokenizer.json", "model.safetensors")  # what is needed of a repository, as far as it has them
PICKLED = "pytorch_model.bin"  # taken where there is no model.safetensors, read as tensors alone, and kept as safetensors
EPILOG = """What is fetched, with its licence, stands in cf_model/metrics/encoders.py (PINNED). A folder that is there already is checked
and left alone. The Hub's own settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT.

LAION's aesthetic head is not on the Hub: --head FILE takes sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor (MIT)."""


def main(argv: list[str]) -> None:
    from cf_model.metrics.encoders import PINNED

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf fetch-weights", description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the folders are made, for `cf score --weights`")
    parser.add_argument("--only", action="append", choices=list(PINNED), help="may be given several times; default: all")
    parser.add_argument("--head", type=Path, metavar="FILE", help="LAION's linear head, which becomes aesthetic-head.safetensors")
    args = parser.parse_args(argv)
    for role in args.only or PINNED:
        print(fetch_role(role, args.out / role))
    if args.head:
        from cf_model.metrics.encoders import save_head

        save_head(args.head, args.out / "aesthetic-head.safetensors")
        print(f"{args.out / 'aesthetic-head.safetensors'}: written")


def fetch_role(role: str, folder: Path) -> str:
    """Fetch the network of a role into a new folder and return a line about it; a folder that is there is checked instead."""
    from huggingface_hub import HfApi, errors, snapshot_download

    from cf_model.metrics.encoders import PINNED, RECORD, check_record, hash_file, keep_as_safetensors

    pinned = PINNED[role]
    if folder.exists():
        if not check_record(folder):
            raise Refused(f"{folder} is there and was not fetched by this command; name another --out, or remove it")
        return f"{folder}: already there, every file as it was fetched"
    try:
        info = HfApi().model_info(pinned.repository, revision=pinned.revision, files_metadata=True)
        listed: dict[str, Any] = {file.rfilename: file for file in info.siblings or []}
        wanted = [name for name in FILES if name in listed] + ([] if FILES[-1] in listed else [PICKLED])
        source = Path(snapshot_download(pinned.repository, revision=pinned.revision, allow_patterns=wanted))
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise Refused(f"{pinned.repository}@{pinned.revision} was not fetched ({reason}); try again where there is a network") from None
    for name in wanted:
        stated = listed[name].lfs.sha256 if name in listed and listed[name].lfs else None
        if not (source / name).is_file() or (stated and hash_file(source / name) != stated):
            raise Refused(f"{name} of {pinned.repository} came damaged; remove {source} and fetch it again")
    part = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in wanted:
        if name == PICKLED:
            keep_as_safetensors(source / name, part / FILES[-1])
        else:
            shutil.copyfile(source / name, part / name)
    digests = {file.name: hash_file(file) for file in sorted(part.iterdir())}
    write_json(part / RECORD, {"repository": pinned.repository, "revision": pinned.revision, "sha256": digests}, indent=1)
    part.replace(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return f"{folder}: {pinned.repository}@{pinned.revision[:12]}, {pinned.licence}, {size:.0f} MB"
