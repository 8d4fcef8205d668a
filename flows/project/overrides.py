"""params.yaml as flows read it, and values laid over it by dotted keys: none that is not there, none of another type."""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def parse_params(text: str) -> dict[str, Any]:
    """By YAML 1.2, as the stages and DVC read it: to PyYAML `off` is false, and 2e-6 a word."""
    stated: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return stated


def apply_overrides(path: Path, overrides: Mapping[str, Any]) -> None:
    """Changes these values in the file, and not a letter beside them. All of them or, when one is refused, none."""
    text = path.read_text()
    stated = parse_params(text)
    known = list(_list_keys(stated))
    for key, value in overrides.items():
        *above, last = key.split(".")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            way = f"did you mean {close[0]}?" if close else f"known sections are {', '.join(map(str, stated))}"
            raise ValueError(f"{key} is not a parameter of {path.name}; {way}")
        section = stated
        for part in above:
            section = section[part]
        fitting = _convert_value(key, value, section[last])
        if (fitting, type(fitting)) == (section[last], type(section[last])):
            continue
        section[last] = fitting
        text = _replace_value(text, key.split("."), fitting)
    if not _parses_to(text, stated):
        raise ValueError(f"{path.name} says something twice, by an anchor or a key, so {', '.join(overrides)} can't be changed in it")
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _parses_to(text: str, stated: Mapping[str, Any]) -> bool:
    try:
        return parse_params(text) == stated
    except YAMLError:
        return False


def _replace_value(text: str, key: list[str], value: Any) -> str:
    """The value that stands in the file under this key, by another one in its place."""
    node = YAML(typ="safe", pure=True).compose(text)
    for part in key:
        name, node = next((name, below) for name, below in node.value if name.value == part)
    first, last = node.start_mark.index, node.end_mark.index
    colon, space = name.end_mark.index + 1, ""
    if first == last:  # nothing at all stands after it
        first, last, space = colon, colon, " "
    elif getattr(node, "flow_style", None) is False:  # lines of their own
        first, space = colon, " "
    rest = text[first:last]
    tail = rest[len(rest.rstrip()) :]  # a section in lines of its own reaches up to the next one
    return f"{text[:first]}{space}{_dump_value(value)}{tail}{text[last:]}"


def _dump_value(value: Any) -> str:
    """In one line, as it may stand anywhere."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width = True, sys.maxsize
    yaml.representer.add_representer(float, _represent_float)
    yaml.dump({"": value}, text)
    return text.getvalue().strip().removeprefix("{'': ").removesuffix("}")


def _list_keys(section: Any, above: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _list_keys(value, f"{above}{key}.")


def _convert_value(key: str, value: Any, now: Any) -> Any:
    """The value, if it is of the kind that stands there. What is null may become anything, and anything null: `cf validate`, which
    knows the types, has the last word."""
    if value is None or now is None:
        return value
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list", dict: "a section"}
    for kind, said in kinds.items():
        if isinstance(now, kind):
            good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if not good:
                raise ValueError(f"{key} is {value!r}; it must be {said}, as {now!r} is now")
            return value
    return value


def _represent_float(representer: Any, value: float) -> Any:
    """With a point: PyYAML, which some of the user's tools may use, reads 2e-06 as a word."""
    text = repr(float(value))
    mantissa, sign, exponent = text.partition("e")
    if sign and "." not in mantissa:
        text = f"{mantissa}.0e{exponent}"
    return representer.represent_scalar("tag:yaml.org,2002:float", text)
