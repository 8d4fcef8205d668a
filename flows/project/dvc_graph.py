"""dvc.yaml as a graph: which stages exist, what each needs, and which have nothing to do. The only file that imports DVC.

`Repo.index.graph` is no public API of DVC; tests/flows/test_stages.py compares it with `dvc dag` and `dvc stage list`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.project.dvc_command import run_dvc
from tasks.files.atomic import open_partial

# keys of meta.cf in dvc.yaml -> types of their values
KEYS: dict[str, tuple[type, ...]] = {"gpus": (int, str), "retries": (int,), "timeout": (int, float)}


@dataclass(frozen=True)
class Stage:
    """A node of the graph: a stage `prepare`, an item of a foreach or matrix `evaluate@short`, or the file of tracked data `raw.dvc`."""

    name: str
    upstream: tuple[str, ...] = ()
    desc: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)  # meta.cf of dvc.yaml
    frozen: bool = False
    command: str = ""  # with every ${value} filled in; empty for tracked data

    @property
    def gpus(self) -> int | str:
        """Number of GPUs that the stage uses alone, or "all" of the machine."""
        return self.meta.get("gpus", 0)

    @property
    def retries(self) -> int:
        """Number of attempts after the first."""
        return self.meta.get("retries", 0)

    @property
    def timeout(self) -> float | None:
        """Seconds that one attempt may take."""
        return self.meta.get("timeout")


def read_graph(root: Path) -> list[Stage]:
    """Read all stages of a project, in the order in which `dvc repro` runs them. It takes a second: read it once, and hand it on.

    Raises ValueError for a key or value of meta.cf that means nothing.
    """
    from dvc.repo import Repo
    from networkx import dfs_postorder_nodes

    with Repo(str(root)) as repo:
        graph = repo.index.graph  # from a stage to what it needs
        order = list(dfs_postorder_nodes(graph))
        return [
            Stage(
                name=_stage_name(stage, root),
                upstream=tuple(_stage_name(other, root) for other in order if graph.has_edge(stage, other)),
                desc=" ".join((stage.desc or "").split()),
                meta=_read_meta(stage, root),
                frozen=bool(stage.frozen),
                command=stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd or ()),
            )
            for stage in order
        ]


def _stage_name(stage: Any, root: Path) -> str:
    """Return what `dvc repro` at the root calls a stage. DVC's own `addressing` depends on the working folder of the process."""
    file = Path(os.path.relpath(stage.path, root)).as_posix()
    name = getattr(stage, "name", None)
    return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"


def _read_meta(stage: Any, root: Path) -> Mapping[str, Any]:
    """Return meta.cf of a stage, checked."""
    name, meta = _stage_name(stage, root), (stage.meta or {}).get("cf", {}) if isinstance(stage.meta, Mapping) else {}
    for key, value in meta.items():
        where = f"meta.cf.{key} of {name} in dvc.yaml is {value!r}"
        if key not in KEYS:
            raise ValueError(f"{where}, which means nothing; known are {', '.join(KEYS)}")
        is_kind = isinstance(value, KEYS[key]) and not isinstance(value, bool)
        if not is_kind or (isinstance(value, str) and value != "all") or (not isinstance(value, str) and value < 0):
            raise ValueError(f"{where}; gpus is a number or all, retries a number, timeout seconds")
    return dict(meta)


def find_unchanged(root: Path, graph: Iterable[Stage]) -> set[str]:
    """Return the stages of `graph` that DVC would skip if no stage before them ran.

    One `dvc status` answers for all stages; asking DVC stage by stage takes a second for each. Raises RuntimeError if it fails.
    """
    status = run_dvc(root, "status", "--json")
    return {stage.name for stage in graph} - set(json.loads(status[status.index("{") :]))


def select_stages(graph: Iterable[Stage], only: Iterable[str] = (), first: str | None = None, last: str | None = None) -> list[Stage]:
    """Select the stages named in `only`, or all; of them, what follows from `first` and what leads to `last`.

    The name of a foreach or matrix selects all its items. Raises ValueError for a name that is no stage, and for an empty selection.
    """
    graph = list(graph)
    for name in [*only, *filter(None, [first, last])]:
        if not _match_name(graph, name):
            close = difflib.get_close_matches(name, [stage.name for stage in graph], n=1)
            way = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{name} is no stage; {way}Known are {', '.join(stage.name for stage in graph)}")
    selected = set().union(*(_match_name(graph, name) for name in only)) if only else {stage.name for stage in graph}
    if first:
        selected &= _add_downstream(graph, _match_name(graph, first))
    if last:
        selected &= _add_upstream(graph, _match_name(graph, last))
    if not selected:
        wanted = f"stages {', '.join(only) or 'all'}, from {first or 'the beginning'}, to {last or 'the end'}"
        raise ValueError(f"nothing is left to run of {wanted}; no stage is all of that at once")
    return [stage for stage in graph if stage.name in selected]


def _match_name(graph: list[Stage], name: str) -> set[str]:
    return {stage.name for stage in graph if name in (stage.name, stage.name.split("@")[0])}


def _add_downstream(graph: list[Stage], names: set[str]) -> set[str]:
    """Return the stages with all that need them; `graph` is in running order."""
    for stage in graph:
        if names & set(stage.upstream):
            names = names | {stage.name}
    return names


def _add_upstream(graph: list[Stage], names: set[str]) -> set[str]:
    """Return the stages with all that they need; `graph` is in running order."""
    for stage in reversed(graph):
        if stage.name in names:
            names = names | set(stage.upstream)
    return names


def freeze_stages(root: Path, names: Iterable[str], frozen: bool = True) -> None:
    """Do what `dvc freeze` and `dvc unfreeze` do, also for a stage with a ${value}, which those two refuse."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    file = root / "dvc.yaml"
    tree = yaml.load(file.read_text())
    for name in names:
        tree["stages"][name].pop("frozen", None)
        if frozen:
            tree["stages"][name]["frozen"] = True
    with open_partial(file) as partial:
        yaml.dump(tree, partial)


def restore_outs(root: Path) -> str | None:
    """Bring back the last good outs of stages that failed, because DVC removes a stage's outs before it runs the stage.

    Return DVC's reason where not all of them are in the cache.
    """
    try:
        run_dvc(root, "checkout", "--quiet")
    except RuntimeError as error:
        return str(error)
    return None


def remove_damaged(root: Path) -> list[str]:
    """Remove what dvc.lock names from the default remote where its content does not fit its name; return the names (md5s).

    DVC itself only notices the damage (`verify`) and makes the result again on every machine: its push sends what is missing, and a
    damaged object is not missing. Every byte is read, so this takes as long as a pull.
    """
    from dvc.repo import Repo
    from dvc_objects.errors import ObjectFormatError

    lock = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text())
    names = sorted({out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", []) if "md5" in out})
    with Repo(str(root)) as repo, ThreadPoolExecutor(8) as pool:
        remote = repo.cloud.get_remote_odb(command="mend")

        def is_damaged(name: str) -> bool:
            try:
                remote.check(name)  # removes what is damaged
            except ObjectFormatError:
                return True
            except FileNotFoundError:
                pass
            return False

        def find_damaged(names: list[str]) -> set[str]:
            return {name for name, damaged in zip(names, pool.map(is_damaged, names), strict=True) if damaged}

        damaged = find_damaged(names)
        for folder in (name for name in names if name.endswith(".dir") and name not in damaged and remote.exists(name)):
            entries = find_damaged(sorted({entry["md5"] for entry in json.loads(remote.fs.cat_file(remote.oid_to_path(folder)))}))
            if entries:
                damaged |= entries
                remote.fs.remove(remote.oid_to_path(folder))  # while a folder's list is there, DVC believes that its files are
    return sorted(damaged)
