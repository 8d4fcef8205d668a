"""params.yaml and profiles/*.yaml as text: read in this one place, and every refusal said in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

COMPLETE = "every value is stated, and the files in profiles/ are complete examples"


class Refused(ValueError):
    """What the user stated can't be run; the message is one sentence with the way out."""


def read(path: Path) -> dict[str, Any]:
    """The file by YAML 1.2 rules, which are DVC's: `2e-6` is a number here and `off` is a word, PyYAML reads both the other way."""
    if not path.is_file():
        way = "`cf profile use tiny` writes it" if path.name == "params.yaml" else "name one that is"
        raise Refused(f"{path} isn't there; {way}, and run cf at the root of the project")
    try:
        stated = YAML(typ="safe", pure=True).load(path.read_text())
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        if error.problem and error.problem.startswith("found duplicate key"):
            key = error.problem.split('"')[1]
            raise Refused(f"{path} line {line}: {key} is stated a second time; keep one of the two") from None
        raise Refused(f"{path} line {line} is not YAML: {error.problem}") from None
    if not isinstance(stated, dict):
        raise Refused(f"{path} holds no keys; {COMPLETE}")
    return stated


def at(tree: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            raise Refused(f"{key} isn't in params.yaml, and dvc.yaml names it; {COMPLETE}")
        tree = tree[part]
    return tree


def pipeline(path: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a dvc.yaml, with ${key} replaced by params.yaml's value as DVC does it."""
    return {name: _filled(entry, stated) for name, entry in read(path)["stages"].items()}


def _filled(node: Any, stated: Mapping[str, Any]) -> Any:
    if isinstance(node, str):
        return re.sub(r"\$\{([\w.-]+)\}", lambda found: str(at(stated, found[1])), node)
    if isinstance(node, Mapping):
        return {_filled(key, stated): _filled(value, stated) for key, value in node.items()}
    return [_filled(one, stated) for one in node] if isinstance(node, list) else node


def explain(error: ValidationError, model: type[BaseModel], path: Path) -> str:
    """Key, value, rule and way out of the first thing that is wrong, and how many more there are."""
    first, *others = _worth_saying(error)
    more = f" ({len(others)} more after this one)" if others else ""
    return f"{path}: {_sentence(first, model)}{more}"


def _worth_saying(error: ValidationError) -> list[Any]:
    """An optional section that is wrong also yields `should be None`: noise, unless it is all there is."""
    found = error.errors(include_url=False)
    # a misspelled key is also a missing one: the first says what to do
    found.sort(key=lambda one: one["type"] not in ("extra_forbidden", "unexpected_keyword_argument"))
    return [one for one in found if one["type"] != "none_required"] or found


def _sentence(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    value = error.get("input")
    match error["type"]:
        case "missing":
            return f"{where} is missing; {COMPLETE}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{where} is not a parameter; {_nearest(error['loc'], model)}"
        case "value_error":
            return _from_dataclass(where, value, str(error["ctx"]["error"]))
        case "literal_error":
            return f"{where} is {value!r}; it must be {error['ctx']['expected']}"
    rule = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").split(", unable to")[0]
    if isinstance(value, Mapping):
        return f"{where} is a section of {len(value)} keys; it must be {rule}"
    return f"{where} is {value!r}; it must be {rule}"


def _from_dataclass(where: str, value: Any, said: str) -> str:
    """cf_model's specs begin their sentences with the field's name, and don't know where in params.yaml they stand."""
    name = re.split(r"\W", said, maxsplit=1)[0]
    fields = value if isinstance(value, Mapping) else getattr(value, "kwargs", None) or {}
    return f"{where}.{said}" if where and name in fields else f"{where}: {said}".removeprefix(": ")


def _nearest(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    names = _known(schema, schema, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    return f"known there: {', '.join(names)}" if names else "take it out"


def _known(schema: dict[str, Any], node: dict[str, Any], loc: tuple[Any, ...]) -> list[str]:
    """Names that the JSON schema has at a location; alternatives (`Memory | None`) are looked through."""
    if "$ref" in node:
        return _known(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], loc)
    if "anyOf" in node:
        return [name for one in node["anyOf"] for name in _known(schema, one, loc)]
    if not loc:
        return list(node.get("properties", {}))
    inner = node.get("properties", {}).get(loc[0]) or node.get("additionalProperties")
    # pydantic names the branch of a union in the location of an error: a part that is no key is such a name
    return _known(schema, inner, loc[1:]) if isinstance(inner, dict) else _known(schema, node, loc[1:])
