"""Numbers that papers print: never cells, and never averaged or compared with measured ones. A page shows them apart, with citation.

published.json holds the tables. A column is [metric, protocol, seconds of video]; metrics and protocols have the names of our cells,
as far as the paper's text tells which they are. Numbers are as printed, those in the range 0 to 1 times 100. A context length of 20 is
printed as "20+". Our copy of Self-Forcing++ has no pages, so its tables are cited without.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

OURS = "Context Forcing, student"


class PublishedNumber(NamedTuple):
    """A printed number and where it stands."""

    system: str
    metric: str
    protocol: str | None  # None for what is no score, such as throughput
    seconds: int | None  # of the videos
    value: float
    paper: str
    table: str
    citation: str  # paper, table and page


@cache
def list_published() -> tuple[PublishedNumber, ...]:
    """Return all printed numbers, in the order of the papers' tables."""
    tree = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    out = []
    for table in tree["tables"]:
        page = f", p. {table['page']}" if table["page"] else ""
        citation = f"{tree['papers'][table['paper']]}, Table {table['table']}{page}"
        for system, values in table["rows"].items():
            for (metric, protocol, seconds), value in zip(table["columns"], values, strict=True):
                if value is not None:
                    out.append(PublishedNumber(system, metric, protocol, seconds, value, table["paper"], table["table"], citation))
    return tuple(out)


def find_published(paper: str, table: str, seconds: int | None) -> dict[str, dict[str, float]]:
    """Return system -> metric -> value of one table's numbers for videos of so many seconds."""
    out: dict[str, dict[str, float]] = {}
    for one in list_published():
        if (one.paper, one.table, one.seconds) == (paper, table, seconds):
            out.setdefault(one.system, {})[one.metric] = one.value
    return out
