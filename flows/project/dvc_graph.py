"""dvc.yaml as a graph: which stages there are, what each needs, and which have nothing to do. The only file that imports DVC.

`Repo.index.graph` is no public API of DVC. tests/flows/test_stages.py compares what is read here with `dvc dag` and `dvc stage list`.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

KEYS: dict[str, tuple[type, ...]] = {"gpus": (int, str), "retries": (int,), "timeout": (int, float)}  # of meta.cf


@dataclass(frozen=True)
class Stage:
    """A node: `prepare`, one of a foreach or matrix `evaluate@short`, or the file of tracked data `raw.dvc`."""

    name: str
    upstream: tuple[str, ...] = ()
    desc: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False
    command: str = ""  # with every ${value} filled in; empty for tracked data

    @property
    def gpus(self) -> int | str:
        """That it has to itself; "all" of the machine's."""
        return self.meta.get("gpus", 0)

    @property
    def retries(self) -> int:
        return self.meta.get("retries", 0)

    @property
    def timeout(self) -> float | None:
        return self.meta.get("timeout")


def read_graph(root: Path) -> list[Stage]:
    """All of the project, in the order in which `dvc repro` runs them: what comes first first."""
    from dvc.repo import Repo
    from networkx import dfs_postorder_nodes

    with Repo(str(root)) as repo:
        graph = repo.index.graph  # from a stage to what it needs
        order = list(dfs_postorder_nodes(graph))
        return [
            Stage(
                name=_stage_name(stage, root),
                upstream=tuple(_stage_name(other, root) for other in order if other in set(graph.successors(stage))),
                desc=" ".join((stage.desc or "").split()),
                meta=_read_meta(stage, root),
                frozen=bool(stage.frozen),
                command=stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd or ()),
            )
            for stage in order
        ]


def _stage_name(stage: Any, root: Path) -> str:
    """What `dvc repro` at the root calls it. DVC's own `addressing` depends on the folder that the process is in."""
    file = Path(os.path.relpath(stage.path, root)).as_posix()
    name = getattr(stage, "name", None)
    return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"


def _read_meta(stage: Any, root: Path) -> Mapping[str, Any]:
    name, stated = _stage_name(stage, root), (stage.meta or {}).get("cf", {}) if isinstance(stage.meta, Mapping) else {}
    for key, value in stated.items():
        where = f"meta.cf.{key} of {name} in dvc.yaml is {value!r}"
        if key not in KEYS:
            raise ValueError(f"{where}, which means nothing; known are {', '.join(KEYS)}")
        good = isinstance(value, KEYS[key]) and not isinstance(value, bool)
        if not good or (isinstance(value, str) and value != "all") or (not isinstance(value, str) and value < 0):
            raise ValueError(f"{where}; gpus is a number or all, retries a number, timeout seconds")
    return dict(stated)


def find_unchanged(root: Path, graph: Iterable[Stage] | None = None) -> set[str]:
    """Stages that DVC would skip if nothing before them ran, by one `dvc status`: a whole second less for each of them."""
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"]
    done = subprocess.run(words, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"`dvc status` failed: {said[-1]}")
    changed = set(json.loads(done.stdout[done.stdout.index("{") :]))
    return {stage.name for stage in (read_graph(root) if graph is None else graph)} - changed


def select_stages(known: Iterable[Stage], only: Iterable[str] = (), first: str | None = None, last: str | None = None) -> list[Stage]:
    """Those named, or all; of them, what follows from `first` and what leads to `last`. The name of a foreach is all of its items."""
    known = list(known)
    for name in [*only, *filter(None, [first, last])]:
        if not _match_name(known, name):
            close = difflib.get_close_matches(name, [stage.name for stage in known], n=1)
            way = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{name} is no stage; {way}Known are {', '.join(stage.name for stage in known)}")
    kept = {stage.name for name in only for stage in _match_name(known, name)} if only else {stage.name for stage in known}
    if first:
        kept &= _add_downstream(known, {stage.name for stage in _match_name(known, first)})
    if last:
        kept &= _add_upstream(known, {stage.name for stage in _match_name(known, last)})
    if not kept:
        asked = f"stages {', '.join(only) or 'all'}, from {first or 'the beginning'}, to {last or 'the end'}"
        raise ValueError(f"nothing is left to run of {asked}; no stage is all of that at once")
    return [stage for stage in known if stage.name in kept]


def _match_name(known: list[Stage], name: str) -> list[Stage]:
    return [stage for stage in known if name in (stage.name, stage.name.split("@")[0])]


def _add_downstream(known: list[Stage], found: set[str]) -> set[str]:
    """With all that needs them: `known` is in running order."""
    found = set(found)
    for stage in known:
        if found & set(stage.upstream):
            found.add(stage.name)
    return found


def _add_upstream(known: list[Stage], found: set[str]) -> set[str]:
    found = set(found)
    for stage in reversed(known):
        if stage.name in found:
            found |= set(stage.upstream)
    return found


def freeze_stages(root: Path, names: Iterable[str], frozen: bool = True) -> None:
    """As `dvc freeze` and `dvc unfreeze`, which refuse a stage that has a ${value}."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    file = root / "dvc.yaml"
    stated = yaml.load(file.read_text())
    for name in names:
        stated["stages"][name].pop("frozen", None)
        if frozen:
            stated["stages"][name]["frozen"] = True
    partial = file.with_suffix(".partial")
    with partial.open("w") as opened:
        yaml.dump(stated, opened)
    partial.replace(file)


def restore_outs(root: Path) -> None:
    """The last good outs of stages that failed: DVC removes a stage's outs before it runs it. What isn't in the cache stays away."""
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "checkout", "--quiet"]
    subprocess.run(words, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def remove_damaged(root: Path) -> list[str]:
    """What dvc.lock names and the default remote holds, but not as its name says: taken away there, with the lists that name it.

    DVC alone sees the damage (`verify`) and makes the result anew, on every machine: its push sends what is missing, and a damaged
    object is not missing. All of it is read, so this takes as long as a pull.
    """
    from concurrent.futures import ThreadPoolExecutor

    import yaml
    from dvc.repo import Repo
    from dvc_objects.errors import ObjectFormatError

    lock = yaml.safe_load((root / "dvc.lock").read_text())
    named = {out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", []) if "md5" in out}
    with Repo(str(root)) as repo:
        held = repo.cloud.get_remote_odb(command="mend")

        def broken(oid: str) -> bool:
            try:
                held.check(oid)  # removes what is damaged
            except ObjectFormatError:
                return True
            except FileNotFoundError:
                pass
            return False

        with ThreadPoolExecutor(8) as at_once:
            tops = sorted(named)
            bad = {oid for oid, is_bad in zip(tops, at_once.map(broken, tops), strict=True) if is_bad}
            for oid in (oid for oid in tops if oid.endswith(".dir") and oid not in bad and held.exists(oid)):
                entries = sorted({one["md5"] for one in json.loads(held.fs.cat_file(held.oid_to_path(oid)))})
                if found := {entry for entry, is_bad in zip(entries, at_once.map(broken, entries), strict=True) if is_bad}:
                    bad |= found
                    held.fs.remove(held.oid_to_path(oid))  # while a list is there, DVC believes that all it names is
    return sorted(bad)
