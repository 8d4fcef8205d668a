"""Values laid over params.yaml by dotted keys: only keys that exist, only values of the type that stands there.

DVC's `-S` (hydra's grammar) is not used: it reformats the whole file, checks no types, and takes `+key`, `~key`, sweeps and
`${oc.env:NAME}`, which would put the environment into a committed file.
"""

import difflib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.files.atomic import write_atomically
from tasks.files.trees import list_nodes

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list", dict: "a section"}


def parse_params(text: str) -> dict[str, Any]:
    """Parse params.yaml by YAML 1.2, as the stages and DVC do: to PyYAML `off` is false, and 2e-6 a word."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return params


def apply_overrides(path: Path, overrides: Mapping[str, Any]) -> None:
    """Change values in the file by their dotted keys, and leave comments and formatting as they are.

    Raises ValueError for an unknown key or a value of another type, and then changes nothing.
    """
    text = path.read_text()
    params = parse_params(text)
    for key, value in overrides.items():
        known = dict(list_nodes(params))
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            way = f"did you mean {close[0]}?" if close else f"known sections are {', '.join(map(str, params))}"
            raise ValueError(f"{key} is not a parameter of {path.name}; {way}")
        above, _, last = key.rpartition(".")
        section = known[above] if above else params
        converted = _convert_value(key, value, section[last])
        if (converted, type(converted)) != (section[last], type(section[last])):
            section[last] = converted
            text = _replace_value(text, key.split("."), converted)
    try:
        same = parse_params(text) == params
    except YAMLError:
        same = False
    if not same:  # the text was changed in one place, the parsed values in all that share an anchor
        raise ValueError(f"{path.name} says something twice, by an anchor or a key, so {', '.join(overrides)} can't be changed in it")
    write_atomically(path, text)


def _replace_value(text: str, key: list[str], value: Any) -> str:
    """Return the text of the file with another value under a key."""
    node = YAML(typ="safe", pure=True).compose(text)
    for part in key:
        name, node = next((name, below) for name, below in node.value if name.value == part)
    first, last = node.start_mark.index, node.end_mark.index
    colon, space = name.end_mark.index + 1, ""
    if first == last:  # nothing at all stands after the colon
        first, last, space = colon, colon, " "
    elif getattr(node, "flow_style", None) is False:  # a section in lines of its own
        first, space = colon, " "
    old = text[first:last]
    tail = old[len(old.rstrip()) :]  # a section in lines of its own reaches up to the next key
    return f"{text[:first]}{space}{_dump_value(value)}{tail}{text[last:]}"


def _dump_value(value: Any) -> str:
    """Return a value as YAML in one line, which may stand after any key or within brackets.

    Written by the rules of YAML 1.1, so that PyYAML reads the same value: it takes 2e-06 without a point for a word.
    """
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.version, yaml.default_flow_style, yaml.width = "1.1", True, sys.maxsize
    yaml.dump({"": value}, text)
    return text.getvalue().strip().partition("{'': ")[2].removesuffix("}")


def _convert_value(key: str, value: Any, current: Any) -> Any:
    """Return the value as the type that stands there; ValueError if it is of another.

    Null may become anything and anything null, because `cf validate`, which knows the types, has the last word.
    """
    kind = next((kind for kind in KINDS if isinstance(current, kind)), None)
    if value is None or kind is None:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} is {value!r}; it must be {KINDS[kind]}, as {current!r} is now")
    return value
