"""Reading params.yaml, profiles/*.yaml, dvc.yaml and dvc.lock as DVC reads them. Neither torch nor pydantic: flows imports this file."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

COMPLETE = "every value is stated, and the files in profiles/ are complete examples"


class Refused(ValueError):
    """A refusal of what the user stated: the message is one sentence with the way out, and `cf` ends with code 2."""


@contextmanager
def refuse_errors(way: str = "") -> Iterator[None]:
    """Turn a ValueError, whose sentence is about what the user stated, into a refusal; `way` is added to the sentence."""
    try:
        yield
    except ValueError as error:
        raise Refused(f"{error}{way}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file by YAML 1.2 rules, because DVC does: `2e-6` is a number and `off` a word there, in PyYAML it is the other way round."""
    if not path.is_file():
        remedy = "`cf profile use tiny` writes it" if path.name == "params.yaml" else "name one that is"
        raise Refused(f"{path} isn't there; {remedy}, and run cf at the root of the project")
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text())
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        if error.problem and error.problem.startswith("found duplicate key"):
            key = error.problem.split('"')[1]
            raise Refused(f"{path} line {line}: {key} is stated a second time; keep one of the two") from None
        raise Refused(f"{path} line {line} is not YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise Refused(f"{path} holds no keys; {COMPLETE}")
    return tree


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree of parameters by YAML 1.2 rules."""
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(tree, file)


def value_at(tree: Any, key: str) -> Any:
    """Look up a dotted key of params.yaml."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            raise Refused(f"{key} isn't in params.yaml, and dvc.yaml names it; {COMPLETE}")
        tree = tree[part]
    return tree


def fill_in_values(node: Any, tree: Mapping[str, Any]) -> Any:
    """Replace ${key} by the value in `tree`, in all keys and values of a node of dvc.yaml, as DVC does."""
    if isinstance(node, str):
        return re.sub(r"\$\{([\w.-]+)\}", lambda match: str(value_at(tree, match[1])), node)
    if isinstance(node, Mapping):
        return {fill_in_values(key, tree): fill_in_values(value, tree) for key, value in node.items()}
    return [fill_in_values(entry, tree) for entry in node] if isinstance(node, list) else node
