"""params.yaml as `Params`: every value by its type, then every rule between sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .explain import explain_first_error
from .rules import RULES
from .schema import Params
from .yaml_file import Refused, read_yaml


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a parameter file; raise Refused with one sentence that begins with its path."""
    return validate_params(read_yaml(path), path)


def validate_params(tree: Mapping[str, Any], path: Path) -> Params:
    """Turn the tree of a parameter file into types and check it; `path` is where the refusal says that the fault stands."""
    try:
        params = Params.model_validate(tree)
        for check in RULES:
            check(params)
    except ValidationError as error:
        raise Refused(explain_first_error(error, Params, path)) from None
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
    return params
