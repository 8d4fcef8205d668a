"""What one run of the pipeline is asked to do: the form in Prefect's UI, and the options of `python -m flows.pipeline`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

# Also what keeps a word of a form from being anything else to git, DVC or a shell.
STAGE = r"^[A-Za-z0-9_][A-Za-z0-9_./:@-]{0,100}$"
OVERRIDE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*=[^\r\n]{1,1000}$"
StageName = Annotated[str, StringConstraints(pattern=STAGE)]
Override = Annotated[str, StringConstraints(pattern=OVERRIDE)]

Profile = Literal["params.yaml", "tiny", "smoke", "wan-1.3b"]


class RunConfig(BaseModel):
    """Which parameters, and which stages. Everything not stated is as committed."""

    model_config = ConfigDict(extra="forbid")

    profile: Profile = Field(
        "params.yaml", description="The parameters to start from: params.yaml as it is committed, or one of profiles/."
    )
    overrides: list[Override] = Field(
        default_factory=list,
        max_length=50,
        description="Values laid over them, one key=value each, for example stage2.steps=300 or stage2.teacher.context=none.",
    )
    stages: list[StageName] = Field(
        default_factory=list,
        max_length=100,
        description="Only these stages, checked when the run begins; empty for all. What they need must have been made before.",
    )
    from_stage: StageName | None = Field(None, description="Only this stage and what follows from it. Checked when the run begins.")
    to_stage: StageName | None = Field(None, description="Only this stage and what leads to it. Checked when the run begins.")
    at_once: int = Field(4, ge=1, le=16, description="Independent stages at the same time, at most.")
    dry_run: bool = Field(False, description="Only say which stages would run, and why.")
    pull: bool = Field(False, description="Take a stage's result from the DVC remote, where another machine has made the same.")
    push: bool = Field(False, description="Afterwards send results and run cache to the DVC remote.")

    @field_validator("overrides")
    @classmethod
    def _readable(cls, stated: list[str]) -> list[str]:
        parse(stated)
        return stated

    def changes(self) -> dict[str, Any]:
        return parse(self.overrides)


def parse(stated: list[str]) -> dict[str, Any]:
    """key=value lines as values by YAML 1.2, which are params.yaml's rules: 2e-6 is a number, none is a word, [1, 2] is a list."""
    found: dict[str, Any] = {}
    for one in stated:
        key, sign, text = one.partition("=")
        if not sign or not re.fullmatch(OVERRIDE, one):
            raise ValueError(f"the override {one!r} is not key=value, with a dotted key of params.yaml: stage2.steps=300")
        if re.search(r"(^|[\s\[{,:])[&*][A-Za-z0-9]", text):
            raise ValueError(f"the override {key} has an anchor or an alias of YAML (& or *); write the value itself")
        if key in found:
            raise ValueError(f"the override {key} is stated twice; keep one of the two")
        try:
            found[key] = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise ValueError(f"the override {one!r} has a value that is not YAML; quote text that holds : or [") from None
    return found
