"""dvc.yaml as a graph: which stages exist, what each needs, and which have nothing to do.

`Repo.index.graph` is no public API of DVC; tests/flows/test_stages.py compares it with `dvc dag` and `dvc stage list`.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
from ruamel.yaml import YAML

from tasks.files.atomic import open_partial
from tasks.files.dvc_rwlock import mend_rwlock

# keys of meta.cf in dvc.yaml -> types of their values
KEYS: dict[str, tuple[type, ...]] = {"gpus": (int, str), "retries": (int,), "timeout": (int, float)}


@dataclass(frozen=True)
class Stage:
    """A node of the graph: a stage `prepare`, an item of a foreach or matrix `evaluate@short`, or the file of tracked data `raw.dvc`."""

    name: str
    upstream: tuple[str, ...] = ()
    desc: str = ""
    frozen: bool = False
    command: str = ""  # with every ${value} filled in; empty for tracked data
    # meta.cf of dvc.yaml
    gpus: int | str = 0  # number of GPUs that the stage uses alone, or "all" of the machine
    retries: int = 0  # attempts after the first
    timeout: float | None = None  # seconds that one attempt may take


@contextmanager
def _open_project(root: Path) -> Iterator[Any]:
    """Open a project by DVC's own library, which starts no process. DVC's refusals become ValueErrors."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    mend_rwlock(root)
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            yield repo
    except DvcException as error:
        raise ValueError(f"DVC can't read {root}: {' '.join(str(error).split())}") from None


def read_graph(root: Path) -> list[Stage]:
    """Read all stages of a project, in the order in which `dvc repro` runs them. It takes a second: read it once, and hand it on.

    Raises ValueError for what DVC refuses, and for a key or value of meta.cf that means nothing.
    """
    with _open_project(root) as repo:
        graph = repo.index.graph  # from a stage to what it needs
        order = list(networkx.dfs_postorder_nodes(graph))
        return [
            Stage(
                name=_stage_name(stage, root),
                upstream=tuple(_stage_name(other, root) for other in order if graph.has_edge(stage, other)),
                desc=" ".join((stage.desc or "").split()),
                frozen=bool(stage.frozen),
                command=stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd or ()),
                **_read_meta(stage, root),
            )
            for stage in order
        ]


def _stage_name(stage: Any, root: Path) -> str:
    """Return what `dvc repro` at the root calls a stage. DVC's own `addressing` depends on the working folder of the process."""
    file = Path(os.path.relpath(stage.path, root)).as_posix()
    name = getattr(stage, "name", None)
    return file if name is None else name if file == "dvc.yaml" else f"{file}:{name}"


def _read_meta(stage: Any, root: Path) -> dict[str, Any]:
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


def find_unchanged(root: Path, graph: Iterable[Stage], warn: Callable[[str], object] = print) -> set[str]:
    """Return the stages of `graph` that DVC would skip if no stage before them ran.

    It asks as `dvc status` does, in this process, since one of its own takes seconds. None where that fails, so each stage asks.
    """
    try:
        with _open_project(root) as repo, repo.lock:
            changed = {_stage_name(stage, root) for stage in repo.index.stages if stage.status()}
    except ValueError as error:
        warn(str(error))
        return set()
    return {stage.name for stage in graph} - changed


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
    edges = networkx.DiGraph([(other, stage.name) for stage in graph for other in stage.upstream])
    edges.add_nodes_from(stage.name for stage in graph)
    if first:
        selected &= set().union(*(networkx.descendants(edges, name) | {name} for name in _match_name(graph, first)))
    if last:
        selected &= set().union(*(networkx.ancestors(edges, name) | {name} for name in _match_name(graph, last)))
    if not selected:
        wanted = f"stages {', '.join(only) or 'all'}, from {first or 'the beginning'}, to {last or 'the end'}"
        raise ValueError(f"nothing is left to run of {wanted}; no stage is all of that at once")
    return [stage for stage in graph if stage.name in selected]


def _match_name(graph: list[Stage], name: str) -> set[str]:
    return {stage.name for stage in graph if name in (stage.name, stage.name.split("@")[0])}


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
