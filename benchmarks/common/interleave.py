"""CPU time of several ways to do the same work, measured in turn (A B B A), so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(ways: Mapping[str, Callable[[], object]], *, rounds: int, units: int = 1) -> dict[str, list[float]]:
    """Run every way `rounds` times, forwards and backwards in turn; return milliseconds of CPU time of each run, divided by `units`."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            began = time.process_time()
            ways[name]()
            spent[name].append(1000 * (time.process_time() - began) / units)
    return spent


def summarize(values: list[float]) -> dict[str, Any]:
    """Return median, least and most of some milliseconds."""
    middle, ends = statistics.median(values), [round(min(values), 2), round(max(values), 2)]
    return {"median_ms": round(middle, 2), "range_ms": ends, "runs": len(values)}


def compare(spent: Mapping[str, list[float]], way: str, other: str) -> dict[str, Any]:
    """Return how many times as long `other` takes as `way`: of the medians, and the range over the pairs of the same round."""
    pairs = [b / a for a, b in zip(spent[way], spent[other], strict=True)]
    ratio = statistics.median(spent[other]) / statistics.median(spent[way])
    return {"ratio": round(ratio, 3), "range": [round(min(pairs), 3), round(max(pairs), 3)]}
