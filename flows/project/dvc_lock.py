"""What dvc.lock and *.dvc files record, compared with what lies in the workspace.

DVC trusts its state database: a damaged file that has kept its time and size is "up to date" to it (treeverse/dvc #5978, #9641).
`cf verify` hashes everything again, before a model is judged and before it is promoted.
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.cli import one_line_errors
from flows.project.dvc_graph import Stage
from flows.project.git import read_committed
from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.options import parse_options
from tasks.files.words import count_things

Out = Mapping[str, Any]  # path, md5, and size or nfiles, as DVC writes them


def read_lock(root: Path) -> dict[str, list[Out]]:
    """Read the outs of each stage that the workspace's dvc.lock records; empty before the first stage has run."""
    lock = root / "dvc.lock"
    return _parse_outs(lock.read_text() if lock.is_file() else "")


def read_outs(root: Path) -> dict[str, list[Out]]:
    """Read the outs that the workspace's dvc.lock records, and data that `dvc add` tracks (raw.dvc)."""
    tracked = {file.name: yaml.safe_load(file.read_text()) or {} for file in sorted(root.glob("*.dvc")) if file.is_file()}
    return read_lock(root) | {name: data.get("outs", []) for name, data in tracked.items()}


def read_outs_at(repo: Path, commit: str) -> dict[str, list[Out]]:
    """Read the outs that a commit's dvc.lock records. Raises ValueError for a commit without dvc.lock."""
    if (text := read_committed(repo, commit, "dvc.lock")) is None:
        raise ValueError(f"{commit[:12]} has no dvc.lock, so it says nothing about what its stages made")
    return _parse_outs(text)


def _parse_outs(text: str) -> dict[str, list[Out]]:
    stages = (yaml.safe_load(text) or {}).get("stages", {})
    return {name: stage.get("outs", []) for name, stage in stages.items()}


def find_out(repo: Path, commit: str, path: str) -> Out:
    """Return the out at `path` in a commit's dvc.lock. Raises ValueError if there is none."""
    for outs in read_outs_at(repo, commit).values():
        for out in outs:
            if out["path"] == path:
                return out
    raise ValueError(f"the dvc.lock of {commit[:12]} has no {path}; run the pipeline and commit dvc.lock first")


def find_damage(root: Path, names: Collection[str] = ()) -> list[str]:
    """Hash the outs of the stages `names`, or of all; return a sentence for each that is not what dvc.lock records.

    Raises ValueError for a stage that dvc.lock does not have.
    """
    recorded = read_outs(root)
    if unknown := [name for name in names if name not in recorded]:
        raise ValueError(f"dvc.lock has no stage {unknown[0]}; it has {', '.join(recorded) or 'none'}")
    outs = [(name, out) for name, outs in recorded.items() if name in (names or recorded) for out in outs]
    return [f"{name}: {damage}" for name, out in outs if (damage := describe_damage(root / out["path"], out))]


def describe_damage(path: Path, out: Out) -> str | None:
    """Say how the file or folder differs from what dvc.lock records of it; None if it does not."""
    recorded = str(out.get("md5", ""))
    if not path.exists():
        return f"{path.name} is not there; `dvc checkout` brings it"
    if recorded.endswith(".dir") != path.is_dir():
        return f"{path.name} is {'a folder' if path.is_dir() else 'no folder'}, which dvc.lock says it is not"
    md5 = compute_dvc_md5(path, again=True)
    return None if md5 == recorded else f"{path.name} has the md5 {md5}, not {recorded}; delete it, and `dvc checkout` brings the right one"


def list_recorded(text: str) -> list[str]:
    """Return the stages of a dvc.lock, in its order."""
    return list(_split_blocks(text)[1])


def sort_lock(root: Path, committed: list[str], graph: Iterable[Stage]) -> None:
    """Put dvc.lock in the order in which `dvc repro` would have written it: `committed` stages first, then as in `graph`.

    DVC appends a stage when it first ends, and stages that run at the same time end in any order. Not while DVC runs.
    """
    lock = root / "dvc.lock"
    if not lock.exists():
        return
    text = lock.read_text()
    head, blocks = _split_blocks(text)
    order = dict.fromkeys([*committed, *(stage.name for stage in graph), *blocks])
    ordered = head + "".join(blocks[name] for name in order if name in blocks)
    if ordered != text:
        write_atomically(lock, ordered)


def _split_blocks(text: str) -> tuple[str, dict[str, str]]:
    """Split a dvc.lock into what comes before the stages, and each stage's lines."""
    head, *parts = re.split(r"^(?=  [^ ].*:\n)", text, flags=re.MULTILINE)
    return head, {part.split(":\n", 1)[0].strip(" '\""): part for part in parts}


@one_line_errors
def main(argv: list[str]) -> None:
    names, root = parse_options("verify", argv).stages, Path.cwd()
    if damage := find_damage(root, names):
        print("\n".join(damage))
        sys.exit(1)
    checked = sum(len(outs) for name, outs in read_outs(root).items() if name in names or not names)
    print(f"{count_things(checked, 'out')} compared: as dvc.lock says")


if __name__ == "__main__":
    main(sys.argv[1:])
