"""What earlier nights left behind: a branch nightly/DATE each, with nightly/record.json in it."""

import json
import re
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, Field

from flows.project.git import read_committed, run_git

RECORD, GATE, PROMPTS = "nightly/record.json", "nightly/gate.json", "nightly/prompts.txt"
DATE = re.compile(r"\d{4}-\d{2}-\d{2}(-\d{1,3})?")


class NightRecord(BaseModel, frozen=True):
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
    # of the branch, and not in the file
    when: int = Field(0, exclude=True)  # Unix time of the last commit
    ref: str = Field("", exclude=True)

    def to_json(self) -> str:
        """Return the text of nightly/record.json."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_nights(repo: Path) -> list[NightRecord]:
    """Return the nights that came to an end, here or at origin, oldest first by their dates, because a clock may be set back."""
    records: dict[str, NightRecord] = {}
    for date, ref, when in _night_branches(repo):
        text = read_committed(repo, ref, RECORD) if DATE.fullmatch(date) and date not in records else None
        with suppress(ValueError):  # a branch that is no night's; keys that another version wrote are ignored
            record = NightRecord.model_validate_json(text or "")
            if record.date == date:
                records[date] = record.model_copy(update={"when": when, "ref": ref})
    return sorted(records.values(), key=lambda record: (record.date[:10], int(record.date[11:] or 0)))


def _night_branches(repo: Path) -> list[tuple[str, str, int]]:
    """Return date, ref, and Unix time of the last commit of every night's branch."""
    listed = run_git(repo, "for-each-ref", "--format=%(refname) %(committerdate:unix)", "refs/heads/nightly", "refs/remotes/origin/nightly")
    rows = [row.rsplit(" ", 1) for row in listed.splitlines()]
    return [(ref.partition("nightly/")[2], ref, int(when)) for ref, when in rows]


def free_date(repo: Path, date: str) -> str:
    """Return the date, or date-2, date-3 if a branch has that name, here or at origin, whatever is in the branch."""
    taken = {name for name, _, _ in _night_branches(repo)}
    names = (date if number == 1 else f"{date}-{number}" for number in range(1, 1000))
    return next(name for name in names if name not in taken)
