"""A night in the making, and what it needs of params.yaml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.night import gate
from flows.night.inbox import Arrivals
from flows.night.records import Night
from flows.project.registry import Version


class Settings(BaseModel):
    """What flows needs of params.yaml's section `nightly`; tasks/params/nightly.py says what each means, and checks them."""

    timezone: str
    branch: str
    inbox: Path | None
    settle: float
    weekly: str
    keep: list[str]
    prompts_file: Path | None
    prompts: int
    rules: list[gate.Rule]
    push_timeout: float
    push_again_after: list[float]


@dataclass
class Work:
    repo: Path
    root: Path
    date: str
    run: str
    base: str
    settings: Settings
    of_a_folder: bool  # clips.source
    folder: str | None  # clips.folder, if DVC tracks it
    full: bool
    before: Version | None  # the promoted student
    past: list[Night]
    line: Callable[[str], None]
    arrived: Arrivals = field(default_factory=Arrivals)
    clips: str | None = None  # md5 of `folder`
    data: dict[str, str] = field(default_factory=dict)
    made: str | None = None  # the version that the candidate became


def settings(stated: dict[str, Any]) -> Settings:
    return Settings.model_validate(stated["nightly"])


def folder_of(stated: dict[str, Any]) -> str | None:
    """clips.folder, if DVC is to track it."""
    if stated["clips"]["source"] != "folder" or Path(stated["clips"]["folder"]).is_absolute():
        return None
    named = Path(stated["clips"]["folder"])
    if len(named.parts) != 1 or named.name in ("", ".."):
        raise ValueError(f"clips.folder is {named}; a night needs one right below the project's root, such as raw, for `dvc add`")
    return named.name


def checked(stated: dict[str, Any]) -> Settings:
    """Refuses what no training could satisfy."""
    ours = settings(stated)
    if stated["clips"]["source"] == "folder" or ours.prompts_file:
        for rule in ours.rules:
            if rule.metric.rpartition(".")[2] in gate.NEED_TRUTH:
                why = "is only known of clips that are rendered (clips.source: worlds), on their own captions"
                raise ValueError(f"nightly.rules asks for {rule.metric}, which {why}; name sharpness or motion, or a metric of your own")
    return ours
