"""Cells: each is one value of one metric of one video. Means, curves, tables and pages are derived from cells and from nothing else.

A cell is a mapping with these names, of which those that do not apply are absent:
    suite, system, prompt, prompt_id, clip, seed, file      which video; a value of all videos of a system has no file
    md5, frames, fps, weights, code, settings               the video's hash and size, and what it was measured with
    protocol, metric, second, value                         what was measured; `second` only for a point of a curve
    failed                                                  why `value` is null; a video that can't be read has a cell without a metric
    clips, answers and others                               what a protocol's averages or its reader need besides
In a file each video has a line of its own with all that its cells share, a short hash of that as `id`, and the number of its cells. The
lines of its cells follow it and name the hash as `of`. So a file that was cut off is noticed, and an interrupted scoring goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

Cell = Mapping[str, Any]
Values = dict[tuple[str, str, str], dict[tuple[str, int], float]]  # suite, system, metric -> item, seed -> value

SUITES = {  # the suites that have a table and videos of their own, and their titles
    "prompts": "Videos from a prompt",
    "continuations": "Continuations of a real prefix",
}
SHARED = ("suite", "system", "prompt", "prompt_id", "clip", "seed", "file", "md5", "frames", "fps", "weights", "code", "settings")
HASH = 12  # hexadecimal digits of a hash that stands in a file many times


def hash_facts(facts: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.md5(json.dumps(facts, sort_keys=True).encode(), usedforsecurity=False).hexdigest()[:HASH]


def hash_code(*modules: ModuleType) -> str:
    """Return a short hash of the source of modules; of a package, of all files that lie in its folder."""
    files = [Path(str(module.__file__)) for module in modules]
    sources = [source for file in files for source in (sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file])]
    return hashlib.md5(b"".join(source.read_bytes() for source in sources), usedforsecurity=False).hexdigest()[:HASH]


def fold_cells(cells: Iterable[Cell]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of cells; cells of a video stand one after the other. `expand_lines` is the way back."""
    for facts, group in groupby(cells, key=lambda cell: [cell.get(name) for name in SHARED]):
        members = list(group)
        shared = {name: members[0][name] for name in SHARED if name in members[0]}
        if len({cell.get("protocol") for cell in members}) == 1:
            shared["protocol"] = members[0].get("protocol")
        key = hash_facts([json.dumps(facts), shared.get("protocol")])
        yield {"id": key, "cells": len(members)} | shared
        yield from ({"of": key} | {name: value for name, value in cell.items() if name not in shared} for cell in members)


def expand_lines(lines: Iterable[Mapping[str, Any]], where: str, *, growing: bool = False) -> list[dict[str, Any]]:
    """Return the cells of a file's lines, each with all of its facts. A line that states all of its facts itself is a cell as it is.

    `growing`: the file's process may have been killed, so a video whose cells are not all there is left out. ValueError, which names the
    file as `where`, for cells of no video or of half a video, and for two cells of one place.
    """
    heads: dict[str, Mapping[str, Any]] = {}
    cells: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for line in lines:
        if "id" in line:
            heads[line["id"]] = line
        elif "of" not in line:
            cells.append(dict(line))
        elif line["of"] not in heads:
            raise ValueError(f"{where} has a cell of {line['of']}, and no line says which video that is; make the file again")
        else:
            counts[line["of"]] += 1
            cells.append({**heads[line["of"]], **line})
    partial = {key for key, head in heads.items() if counts[key] < head["cells"]}
    if partial and not growing:
        some = heads[min(partial)]
        raise ValueError(
            f"{where} has {counts[some['id']]} of {some['cells']} cells of {some.get('file')}: it was cut off; score the videos again"
        )
    kept = (cell for cell in cells if cell.get("of") not in partial)
    whole = [{name: value for name, value in cell.items() if name not in ("id", "of", "cells")} for cell in kept]
    refuse_duplicates(whole, where)
    return whole


def identify_cell(cell: Cell) -> tuple[Any, ...]:
    """Return a cell's place: suite, system, prompt and seed (of a video without these its file), protocol, metric and second."""
    by_prompt = cell.get("prompt_id") is not None and cell.get("seed") is not None
    video = (cell["prompt_id"],) if by_prompt else (cell.get("clip"), cell.get("prompt"), cell.get("file"))
    return (cell.get("suite"), cell.get("system"), *video, cell.get("seed"), cell.get("protocol"), cell.get("metric"), cell.get("second"))


def refuse_duplicates(cells: Sequence[Cell], where: str) -> None:
    """Raise ValueError if two cells have one place, because a mean would count them twice."""
    taken: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        if (other := taken.setdefault(identify_cell(cell), cell)) is not cell:
            video = f"{cell.get('system')}, prompt {cell.get('prompt_id') or cell.get('prompt')!r}, seed {cell.get('seed')}"
            files = f"of {other.get('file')} and of {cell.get('file')}"
            raise ValueError(f"{where} has two cells for {cell.get('metric')} of {video}: {files}; keep one of the two")


def list_protocols(cells: Iterable[Cell]) -> dict[tuple[str, str], frozenset[str]]:
    """Return the protocols that each suite's metrics are measured by."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        if cell.get("metric") and cell.get("protocol"):
            found[cell["suite"], cell["metric"]].add(cell["protocol"])
    return {key: frozenset(names) for key, names in found.items()}


def refuse_other_protocols(first: Mapping[tuple[str, str], frozenset[str]], second: Mapping[tuple[str, str], frozenset[str]],
                           names: tuple[str, str] = ("A", "B")) -> None:  # fmt: skip
    """Raise ValueError if two sides, as list_protocols gives them, measure a metric by different protocols. Cells from before
    protocols were stated say nothing.
    """
    for suite, metric in sorted(first.keys() & second.keys()):
        one, other = first[suite, metric], second[suite, metric]
        if not one & other:
            raise ValueError(
                f"{metric} in {suite} is measured by protocol {min(one)} in {names[0]} and by {min(other)} in {names[1]}, so the numbers "
                f"can't be compared; measure both by one protocol"
            )


def select_item(cell: Cell) -> str:
    """Return what a cell's video is of, the same in all systems: the prompt's id, the clip, or the prompt itself."""
    return str(cell.get("prompt_id") or cell.get("clip") or cell.get("prompt") or cell.get("file"))


def iterate_values(cells: Iterable[Cell]) -> Iterator[Cell]:
    """Yield the cells that hold a whole video's value: no points of curves, no values of all videos together, no failures."""
    return (cell for cell in cells if cell.get("second") is None and cell.get("file", "") is not None and cell["value"] is not None)


def group_values(cells: Iterable[Cell], item: Callable[[Cell], str] = select_item) -> Values:
    """Return whole videos' values by suite, system and metric, each by item and seed; ValueError if a metric has two protocols."""
    out: Values = defaultdict(dict)
    protocols: dict[tuple[str, str, str], str | None] = {}
    for cell in iterate_values(cells):
        key, protocol = (cell["suite"], cell["system"], cell["metric"]), cell.get("protocol")
        if (other := protocols.setdefault(key, protocol)) != protocol:
            raise ValueError(
                f"{key[2]} of {key[1]} in {key[0]} has cells of the protocols {other} and {protocol}, which are never averaged "
                f"together; choose one of them"
            )
        out[key][item(cell), cell["seed"]] = cell["value"]
    return dict(out)


def group_curves(cells: Iterable[Cell]) -> dict[tuple[str, str, str, float], dict[str, list[float]]]:
    """Return the points of curves by suite, system, metric and second: prompt -> values."""
    out: dict[tuple[str, str, str, float], dict[str, list[float]]] = {}
    for cell in cells:
        if cell.get("second") is not None and cell["value"] is not None:
            key = cell["suite"], cell["system"], cell["metric"], cell["second"]
            out.setdefault(key, {}).setdefault(cell["prompt"], []).append(cell["value"])
    return out
