"""Pydantic's validation errors as one sentence: key, value, rule, way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .yaml_file import COMPLETE


def explain_first_error(error: ValidationError, model: type[BaseModel], path: Path) -> str:
    """Describe the first error that names its cause, and count the others."""
    first, *others = _relevant_errors(error)
    more = f" ({len(others)} more after this one)" if others else ""
    return f"{path}: {_describe_error(first, model)}{more}"


def _relevant_errors(error: ValidationError) -> list[Any]:
    """Drop `should be None`, which every error inside an optional section adds, unless no other error is left."""
    errors = error.errors(include_url=False)
    # A misspelled key is also a missing key. Unknown keys come first because their sentence names the right spelling.
    errors.sort(key=lambda entry: entry["type"] not in ("extra_forbidden", "unexpected_keyword_argument"))
    return [entry for entry in errors if entry["type"] != "none_required"] or errors


def _describe_error(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    value = error.get("input")
    match error["type"]:
        case "missing":
            return f"{where} is missing; {COMPLETE}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{where} is not a parameter; {_suggest_key(error['loc'], model)}"
        case "value_error":
            return _locate_spec_error(where, value, str(error["ctx"]["error"]))
        case "literal_error":
            return f"{where} is {value!r}; it must be {error['ctx']['expected']}"
    rule = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").split(", unable to")[0]
    if isinstance(value, Mapping):
        return f"{where} is a section of {len(value)} keys; it must be {rule}"
    return f"{where} is {value!r}; it must be {rule}"


def _locate_spec_error(where: str, value: Any, message: str) -> str:
    """Put the section before a message of cf_model's dataclasses, which begins with a field's name and knows no section."""
    name = re.split(r"\W", message, maxsplit=1)[0]
    fields = value if isinstance(value, Mapping) else getattr(value, "kwargs", None) or {}
    return f"{where}.{message}" if where and name in fields else f"{where}: {message}".removeprefix(": ")


def _suggest_key(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    names = _list_keys(schema, schema, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    return f"known there: {', '.join(names)}" if names else "take it out"


def _list_keys(schema: dict[str, Any], node: dict[str, Any], loc: tuple[Any, ...]) -> list[str]:
    """List the keys that the JSON schema allows at a location, in all alternatives of a union (`Memory | None`)."""
    if "$ref" in node:
        return _list_keys(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], loc)
    if "anyOf" in node:
        return [name for branch in node["anyOf"] for name in _list_keys(schema, branch, loc)]
    if not loc:
        return list(node.get("properties", {}))
    inner = node.get("properties", {}).get(loc[0]) or node.get("additionalProperties")
    # The location of an error also names the branch of a union, which is no key of the file: such a part is skipped.
    return _list_keys(schema, inner, loc[1:]) if isinstance(inner, dict) else _list_keys(schema, node, loc[1:])
