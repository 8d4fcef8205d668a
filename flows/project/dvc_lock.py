"""What dvc.lock and *.dvc files say, against what lies in the workspace.

DVC trusts its state database: a damaged file that has kept its time and size is "up to date" to it (treeverse/dvc #5978, #9641).
`cf verify` hashes everything again, before a model is judged and before one is promoted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.cli import one_line_errors
from flows.project.dvc_graph import Stage
from flows.project.git import run_git

Out = Mapping[str, Any]  # path, md5, and size or nfiles, as DVC writes them


def parse_outs(text: str) -> dict[str, list[Out]]:
    """Stage -> its outs, of a dvc.lock's text."""
    tree = yaml.safe_load(text) or {}
    return {name: stage.get("outs", []) for name, stage in tree.get("stages", {}).items()}


def read_outs(root: Path) -> dict[str, list[Out]]:
    """Of the workspace, data that `dvc add` tracks among them (raw.dvc)."""
    lock = root / "dvc.lock"
    found = parse_outs(lock.read_text()) if lock.is_file() else {}
    for file in sorted(root.glob("*.dvc")):
        if file.is_file():
            found[file.name] = (yaml.safe_load(file.read_text()) or {}).get("outs", [])
    return found


def read_outs_at(repo: Path, commit: str) -> dict[str, list[Out]]:
    """Of a commit."""
    try:
        return parse_outs(run_git(repo, "show", "--end-of-options", f"{commit}:dvc.lock"))
    except RuntimeError:
        raise ValueError(f"{commit[:12]} has no dvc.lock, so it says nothing about what its stages made") from None


def find_out(repo: Path, commit: str, path: str) -> Out:
    for outs in read_outs_at(repo, commit).values():
        for out in outs:
            if out["path"] == path:
                return out
    raise ValueError(f"the dvc.lock of {commit[:12]} has no {path}; run the pipeline and commit dvc.lock first")


def find_damage(root: Path, names: list[str] | None = None) -> list[str]:
    """One sentence for every out that is not what dvc.lock says; of these stages, or of all."""
    known = read_outs(root)
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"dvc.lock has no stage {unknown[0]}; it has {', '.join(known) or 'none'}")
    found = ((name, out) for name, outs in known.items() if not names or name in names for out in outs)
    return [f"{name}: {said}" for name, out in found if (said := describe_damage(root / out["path"], out))]


def describe_damage(path: Path, out: Out) -> str | None:
    """What is not as stated."""
    stated = str(out.get("md5", ""))
    if not path.exists():
        return f"{path.name} is not there; `dvc checkout` brings it"
    if stated.endswith(".dir") != path.is_dir():
        return f"{path.name} is {'a folder' if path.is_dir() else 'no folder'}, which dvc.lock says it is not"
    found = md5(path)
    return None if found == stated else f"{path.name} has the md5 {found}, not {stated}; delete it, and `dvc checkout` brings the right one"


def md5(path: Path) -> str:
    """As DVC 3 makes it: of a file's bytes; of a folder, over the list of what is in it."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    listing = json.dumps([{"md5": md5(file), "relpath": name} for name, file in files], sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


@one_line_errors
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf verify", description="Hashes the workspace's outs again and compares them with dvc.lock.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    names, root = parser.parse_args(argv).stages, Path.cwd()
    if found := find_damage(root, names):
        print("\n".join(found))
        sys.exit(1)
    print(f"{sum(1 for _ in _select_outs(root, names))} outs are what dvc.lock says")


def _select_outs(root: Path, names: list[str]) -> Iterator[Out]:
    for name, outs in read_outs(root).items():
        if not names or name in names:
            yield from outs


if __name__ == "__main__":
    main(sys.argv[1:])


def list_recorded(text: str) -> list[str]:
    """The stages that a dvc.lock has, in its order."""
    return list(_split_blocks(text)[1])


def sort_lock(root: Path, before: list[str], known: Iterable[Stage]) -> None:
    """dvc.lock as `dvc repro` would have written it. DVC adds a stage at the end when it first ends, and those that run at the same
    time end in any order. `before`: what is committed; what a killed run left is in no order. Not while DVC runs."""
    lock = root / "dvc.lock"
    if not lock.exists():
        return
    text = lock.read_text()
    head, blocks = _split_blocks(text)
    order = dict.fromkeys([*before, *(stage.name for stage in known), *blocks])
    ordered = head + "".join(blocks[name] for name in order if name in blocks)
    if ordered != text:
        partial = lock.with_suffix(".partial")
        partial.write_text(ordered)
        partial.replace(lock)


def _split_blocks(text: str) -> tuple[str, dict[str, str]]:
    """What comes before the stages, and each stage's lines."""
    head, *parts = re.split(r"^(?=  [^ ].*:\n)", text, flags=re.MULTILINE)
    return head, {part.split(":\n", 1)[0].strip(" '\""): part for part in parts}
