"""A finding of `cf doctor`: one line of its report, and the type of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from flows.machine.settings import Machine

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it; `todo` is empty where there is nothing to do. `cf doctor --json` has these names."""

    name: str
    level: Level
    said: str
    todo: str = ""


Check = Callable[[Machine, bool], Iterator[Finding]]  # with True as the second argument it also mends what is stale
