"""A finding of `cf doctor`: one line of its report."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it; `todo` is empty where there is nothing to do. `cf doctor --json` has these names."""

    name: str
    level: Level
    said: str
    todo: str = ""
