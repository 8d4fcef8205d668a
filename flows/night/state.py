"""One night: what it is given, what it has found so far, how it ended, and what it needs of params.yaml."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.night import gate
from flows.night.inbox import Arrivals
from flows.night.records import NightRecord
from flows.project.registry import Version


class NightSettings(BaseModel):
    """What flows needs of params.yaml's section `nightly`; tasks/params/nightly.py explains and checks each value."""

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


@dataclass(frozen=True)
class NightPlan:
    """What a night is given before it begins; nothing of it changes while the night is at work."""

    repo: Path  # the checkout that nights are started in
    root: Path  # the night's worktree
    date: str  # 2026-01-31
    run: str  # name of the flow run
    base: str  # commit of the tracked branch
    settings: NightSettings
    from_folder: bool  # clips.source is `folder`: clips are files, and not rendered
    clips_folder: str | None  # clips.folder, if DVC tracks it
    full: bool  # everything anew, and not from the promoted student
    promoted: Version | None  # the promoted student when the night began
    past: list[NightRecord]
    log: Callable[[str], None]


@dataclass
class NightState:
    """What a night has found and made so far."""

    plan: NightPlan
    arrivals: Arrivals = field(default_factory=Arrivals)
    clips: str | None = None  # md5 of the clips' folder
    drift: str = ""  # which of the filter's rules tonight's clips moved, if they differ from the training set
    data: dict[str, str] = field(default_factory=dict)  # out of a data stage -> md5
    candidate: str | None = None  # md5 of the trained student
    verdict: gate.Verdict | None = None  # of the gate, if the candidate was measured


@dataclass(frozen=True)
class NightEnd:
    """How a night ended: its outcome, one sentence why, the date its branch is named by, and the version that it promoted."""

    outcome: str
    why: str
    date: str
    version: str | None = None


def tracked_clips_folder(params: dict[str, Any]) -> str | None:
    """Return clips.folder by its plain name, or None if DVC is not to track it. Raises ValueError for a folder inside another folder."""
    if params["clips"]["source"] != "folder" or Path(params["clips"]["folder"]).is_absolute():
        return None
    folder = Path(params["clips"]["folder"])
    if len(folder.parts) != 1 or folder.name in ("", ".."):
        raise ValueError(f"clips.folder is {folder}; a night needs one right below the project's root, such as raw, for `dvc add`")
    return folder.name


def check_settings(params: dict[str, Any]) -> NightSettings:
    """Return the section `nightly` of the parameters. Raises ValueError for a rule whose metric no clip of this night is measured by."""
    settings = NightSettings.model_validate(params["nightly"])
    unknown = [rule.metric for rule in settings.rules if rule.metric.rpartition(".")[2] in gate.NEED_TRUTH]
    if unknown and (params["clips"]["source"] != "worlds" or settings.prompts_file):
        why = "is only known of clips that are rendered (clips.source: worlds), on their own captions"
        raise ValueError(f"nightly.rules asks for {unknown[0]}, which {why}; name sharpness or motion, or a metric of your own")
    return settings
