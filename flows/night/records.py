"""What earlier nights left behind: a branch nightly/DATE each, with nightly/record.json in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flows.project.git import git

RECORD, GATE, PROMPTS = "nightly/record.json", "nightly/gate.json", "nightly/prompts.txt"
DATE = re.compile(r"\d{4}-\d{2}-\d{2}(-\d{1,3})?")
OUTCOMES = ("promoted", "refused", "no good clips", "the same again")


@dataclass(frozen=True)
class Night:
    """`clips` and `data` are md5s: of the tracked folder, and of what the data stages made of it."""

    date: str
    kind: str  # full, or warm: from the promoted student
    base: str  # commit of the tracked branch
    clips: str | None
    data: dict[str, str]
    arrived: list[str]
    turned_away: dict[str, str]  # file -> why it did not go into the folder
    rejected: dict[str, int]  # by the filter, of all clips: reason -> how many
    outcome: str
    why: str
    candidate: str | None  # md5
    before: str | None  # version that was promoted before
    run: str
    when: int = 0  # of its commit
    ref: str = ""

    def text(self) -> str:
        said = {name: value for name, value in asdict(self).items() if name not in ("when", "ref")}
        return json.dumps(said, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def nights(repo: Path) -> list[Night]:
    """Those that came to an end, oldest first: here, and those that origin has. By their dates: clocks are set anew."""
    found: dict[str, Night] = {}
    for date, ref, when in _branches(repo):
        night = _read(repo, ref, when) if DATE.fullmatch(date) and date not in found else None
        if night and night.date == date:
            found[date] = night
    return sorted(found.values(), key=lambda night: _order(night.date))


def _branches(repo: Path) -> list[tuple[str, str, int]]:
    """Date, ref, and when it was committed."""
    listed = git(repo, "for-each-ref", "--format=%(refname) %(committerdate:unix)", "refs/heads/nightly", "refs/remotes/origin/nightly")
    rows = [row.rsplit(" ", 1) for row in listed.splitlines()]
    return [(ref.partition("nightly/")[2], ref, int(when)) for ref, when in rows]


def _order(date: str) -> tuple[str, int]:
    return date[:10], int(date[11:] or 0)


def _read(repo: Path, ref: str, when: int) -> Night | None:
    try:
        stated = json.loads(git(repo, "show", f"{ref}:{RECORD}"))
        return Night(**dict(_known(stated)), when=when, ref=ref)
    except (RuntimeError, ValueError, TypeError):  # a branch that something else made
        return None


def _known(stated: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    names = {one.name for one in fields(Night)} - {"when", "ref"}
    return ((name, value) for name, value in stated.items() if name in names)


def free(repo: Path, date: str) -> str:
    """The date, or date-2, date-3 of one that has a branch already, here or at origin, whatever is in it."""
    taken = {name for name, _, _ in _branches(repo)}
    names = (date if number == 1 else f"{date}-{number}" for number in range(1, 1000))
    return next(name for name in names if name not in taken)
