"""params.yaml's sections `start` and `nightly`: what stages begin from, and what every night does with new clips (flows/nightly.py)."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

RENDERED = Path("cf_model/data/worlds.py")  # where clips come from when they are rendered
BRANCH = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
DAYS = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Start(Section):
    """Files and folders that dvc.yaml names by ${start.NAME}, so that DVC sees when they change."""

    clips: Path  # clips.folder, or the code that renders them
    stage2: Path  # what the student of stage 2 begins as: models/stage1, or a student that was promoted

    @model_validator(mode="after")
    def _is_one_word(self) -> Self:
        if not re.fullmatch(r"[\w@./]*[\w@][\w@./-]*", str(self.stage2), re.ASCII):
            raise ValueError(f"stage2 is {str(self.stage2)!r}, which dvc.yaml puts into a command; use letters, digits, and . _ / @ -")
        return self


class Rule(Section):
    """What the candidate must be beside the promoted model: better by `margin`, or, below 0, worse by no more than that."""

    metric: str  # a path into metrics/evaluate.json; the judged system is called student
    better: Literal["higher", "lower"]
    margin: FiniteFloat
    bound: FiniteFloat | None  # and what it must reach in any case, so that small losses don't add up


class Nightly(Section):
    cron: str
    timezone: str
    branch: str  # of which a night takes code and parameters; what it makes goes to a branch nightly/DATE
    inbox: Path | None  # a folder in which new clips arrive; they go into clips.folder, which `dvc add` tracks
    settle: Annotated[float, Field(ge=0)]  # seconds that nobody may have written to a file in it: uploads take time
    weekly: DAYS  # everything anew; other nights begin from the promoted student
    keep: Annotated[list[str], Field(min_length=1)]  # stages that those other nights take as they were when the promoted student was made
    prompts_file: Path | None  # on which candidate and promoted student are judged; null: captions of the held-out clips
    prompts: PositiveInt
    seeds: Annotated[list[int], Field(min_length=1)]
    rules: Annotated[list[Rule], Field(min_length=1)]
    push_timeout: PositiveFloat  # seconds that one attempt to hand data over may take
    push_again_after: list[PositiveFloat]  # seconds before the next attempt; after the last one the next night tries
    absent_hours: PositiveFloat  # without a night that ended well, before someone is told

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if wrong := _wrong_with(self.cron):
            raise ValueError(f"cron is {self.cron!r}: {wrong}; write minute, hour, day, month and day of the week, as in 0 2 * * *")
        try:
            ZoneInfo(self.timezone)
        except (OSError, ValueError, KeyError):
            raise ValueError(f"timezone is {self.timezone!r}, unknown to this system; use a name such as UTC or Europe/Berlin") from None
        if not BRANCH.fullmatch(self.branch) or ".." in self.branch:
            raise ValueError(f"branch is {self.branch!r}; use letters, digits, and . _ - / inside")
        return self

    @model_validator(mode="after")
    def _something_must_not_get_worse(self) -> Self:
        if all(rule.margin < 0 for rule in self.rules):
            raise ValueError("rules has no margin of 0 or more, so that each night could promote a slightly worse student; raise one")
        return self


def _wrong_with(cron: str) -> str | None:
    if not re.fullmatch(r"[\d*/,A-Za-z-]+( [\d*/,A-Za-z-]+){4}", cron):
        return "not five fields of digits, letters and * / , -"
    try:
        CronSim(cron, datetime(2000, 1, 1))
    except CronSimError as error:
        return str(error).lower()
    return None


def starts_are_what_is_used(p: Any) -> None:
    """Called by Params."""
    wanted = p.clips.folder if p.clips.source == "folder" else RENDERED
    if p.start.clips != wanted:
        said = f"clips.source is {p.clips.source}" + (f" and clips.folder {p.clips.folder}" if p.clips.source == "folder" else "")
        raise ValueError(f"start.clips is {p.start.clips}, but {said}; set start.clips to {wanted}, so that DVC sees when it changes")
    if p.nightly.inbox is not None and (p.clips.folder is None or p.clips.folder.is_absolute()):
        said = f"nightly.inbox is {p.nightly.inbox}, but clips.folder is {p.clips.folder}"
        raise ValueError(f"{said}; name a folder of the project that `dvc add` tracks, such as raw, for new clips to go into")
