"""What earlier nights left behind: a branch nightly/DATE each, with nightly/record.json in it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from flows.project.git import run_git

RECORD, GATE, PROMPTS = "nightly/record.json", "nightly/gate.json", "nightly/prompts.txt"
DATE = re.compile(r"\d{4}-\d{2}-\d{2}(-\d{1,3})?")
OF_THE_BRANCH = ("when", "ref")  # fields that the branch says and the file does not


@dataclass(frozen=True)
class NightRecord:
    """How one night ended, as nightly/record.json has it. `clips` is the md5 of the tracked folder, `data` has those of the data stages."""

    date: str  # the night's, and its branch's: 2026-01-05, or 2026-01-05-2 for a second night of the day
    kind: str  # full, or warm: begun from the promoted student
    base: str  # commit of the tracked branch
    clips: str | None
    data: dict[str, str]
    arrived: list[str]
    turned_away: dict[str, str]  # file -> why it did not go into the folder
    rejected: dict[str, int]  # by the filter, of all clips: reason -> how many
    outcome: str
    why: str
    candidate: str | None  # md5
    before: str | None  # version that was promoted when the night began
    run: str
    when: int = 0  # Unix time of the branch's last commit
    ref: str = ""

    def to_json(self) -> str:
        """Return the text of nightly/record.json."""
        values = {name: value for name, value in asdict(self).items() if name not in OF_THE_BRANCH}
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_nights(repo: Path) -> list[NightRecord]:
    """Return the nights that came to an end, here or at origin, oldest first by their dates, because a clock may be set back."""
    records: dict[str, NightRecord] = {}
    for date, ref, when in _night_branches(repo):
        record = _read_record(repo, ref, when) if DATE.fullmatch(date) and date not in records else None
        if record and record.date == date:
            records[date] = record
    return sorted(records.values(), key=lambda record: (record.date[:10], int(record.date[11:] or 0)))


def _night_branches(repo: Path) -> list[tuple[str, str, int]]:
    """Return date, ref, and Unix time of the last commit of every night's branch."""
    listed = run_git(repo, "for-each-ref", "--format=%(refname) %(committerdate:unix)", "refs/heads/nightly", "refs/remotes/origin/nightly")
    rows = [row.rsplit(" ", 1) for row in listed.splitlines()]
    return [(ref.partition("nightly/")[2], ref, int(when)) for ref, when in rows]


def _read_record(repo: Path, ref: str, when: int) -> NightRecord | None:
    """Return the record of a branch, ignoring keys that another version wrote; None for a branch that is no night's."""
    names = {field.name for field in fields(NightRecord)}.difference(OF_THE_BRANCH)
    try:
        values = json.loads(run_git(repo, "show", f"{ref}:{RECORD}"))
        return NightRecord(**{name: value for name, value in values.items() if name in names}, when=when, ref=ref)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None


def free_date(repo: Path, date: str) -> str:
    """Return the date, or date-2, date-3 if a branch has that name, here or at origin, whatever is in the branch."""
    taken = {name for name, _, _ in _night_branches(repo)}
    names = (date if number == 1 else f"{date}-{number}" for number in range(1, 1000))
    return next(name for name in names if name not in taken)
