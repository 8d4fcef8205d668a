"""The sections `start` and `nightly` of params.yaml: what stages begin from, and how flows/nightly.py trains on new clips."""

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

RENDERED = Path("cf_model/data/worlds.py")  # where clips come from when they are rendered
COLLECTIONS = Path("cf_model/data/hub_collections.py")  # where they come from when a collection is fetched
CAPTIONS = Path("data/manifest.jsonl")  # where the students' prompts come from when they are the clips' captions
HELDOUT = Path("data/prompts/heldout.txt")  # the share of a file's prompts that the stage prompts keeps from training
BRANCH = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
DAYS = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Start(Section):
    """Files and folders that dvc.yaml names by ${start.NAME}, so that DVC tracks them as dependencies."""

    clips: Path  # clips.folder, or the code that renders or fetches them
    prompts: Path  # of the students: data/manifest.jsonl for the training clips' captions, or a text, CSV or Parquet file
    stage2: Path  # weights that the student of stage 2 begins with: models/stage1, or a promoted student

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        for name in ("prompts", "stage2"):
            value = str(getattr(self, name))
            if not re.fullmatch(r"[\w@./]*[\w@][\w@./-]*", value, re.ASCII):
                raise ValueError(f"{name} is {value!r}, which dvc.yaml puts into a command; use letters, digits, and . _ / @ -")
        if self.prompts != CAPTIONS and self.prompts.suffix not in (".txt", ".csv", ".parquet"):
            table = "a .csv or .parquet file with a column `prompt`"
            way = f"use {CAPTIONS} for the clips' captions, a .txt file with one prompt a line, or {table}"
            raise ValueError(f"prompts is {self.prompts}, which is neither captions nor a file of prompts; {way}")
        return self


class Rule(Section):
    """A condition of promotion: the candidate beats the promoted student by `margin`; below 0, it may be worse by as much."""

    metric: str  # a path into metrics/evaluate.json; the judged system is called student
    better: Literal["higher", "lower"]
    margin: FiniteFloat
    bound: FiniteFloat | None  # a value that the candidate must reach in any case, because small losses add up over nights


class Nightly(Section):
    """When a night trains, on which clips and stages, and by which rules its student is promoted."""

    cron: str
    timezone: str
    branch: str  # from which a night takes code and parameters; its results go to a branch nightly/DATE
    inbox: Path | None  # folder in which new clips arrive; a night moves them into clips.folder, which `dvc add` tracks
    settle: Annotated[float, Field(ge=0)]  # seconds since the last write to a file of the inbox, after which its upload counts as complete
    weekly: DAYS  # the night that trains all stages anew; the others begin from the promoted student
    keep: Annotated[list[str], Field(min_length=1)]  # stages whose results the other nights reuse from the run of the promoted student
    prompts_file: Path | None  # prompts that candidate and promoted student are judged on; null: captions of the held-out clips
    prompts: PositiveInt
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    rules: Annotated[list[Rule], Field(min_length=1)]
    push_timeout: PositiveFloat  # seconds that an attempt to push data may take
    push_again_after: list[PositiveFloat]  # seconds before each further attempt; after the last attempt the next night pushes
    absent_hours: PositiveFloat  # hours without a successful night before an alert is sent

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if fault := _explain_cron_fault(self.cron):
            raise ValueError(f"cron is {self.cron!r}: {fault}; write minute, hour, day, month and day of the week, as in 0 2 * * *")
        try:
            ZoneInfo(self.timezone)
        except (OSError, ValueError, KeyError):
            raise ValueError(f"timezone is {self.timezone!r}, unknown to this system; use a name such as UTC or Europe/Berlin") from None
        if not BRANCH.fullmatch(self.branch) or ".." in self.branch:
            raise ValueError(f"branch is {self.branch!r}; use letters, digits, and . _ - / inside")
        if all(rule.margin < 0 for rule in self.rules):
            raise ValueError("rules has no margin of 0 or more, so that each night could promote a slightly worse student; raise one")
        return self


def _explain_cron_fault(cron: str) -> str | None:
    """Say what is wrong with a cron expression; None if it is valid."""
    if not re.fullmatch(r"[\d*/,A-Za-z-]+( [\d*/,A-Za-z-]+){4}", cron):
        return "not five fields of digits, letters and * / , -"
    try:
        CronSim(cron, datetime(2000, 1, 1))
    except CronSimError as error:
        return str(error).lower()
    return None
