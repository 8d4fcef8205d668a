"""The type checker that conftest.py hands to jaxtyping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too, as for mypy


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for functions that take a Protocol: those it can only check when the protocol is marked for it."""
    try:
        return CHECKED(function)
    except BeartypeDecorHintPep3119Exception:
        return function
