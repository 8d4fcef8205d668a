"""What the doctor finds: one line of its report, and the type of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from flows.machine.settings import Machine


@dataclass(frozen=True)
class Line:
    """One answer. `todo` is empty where there is nothing to do."""

    name: str
    level: Literal["ok", "warn", "fail"]
    said: str
    todo: str = ""


Check = Callable[[Machine, bool], Iterator[Line]]
