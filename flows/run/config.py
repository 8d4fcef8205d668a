"""What one run of the pipeline is asked to do: the form in Prefect's UI, and the options of `python -m flows.pipeline`."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, GetJsonSchemaHandler, StringConstraints
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.project.dvc_graph import Stage, select_stages
from tasks.params.yaml_file import read_yaml

# The patterns also keep a word of the form from being an option or a command to git, DVC or a shell.
STAGE = r"^[A-Za-z0-9_][A-Za-z0-9_./:@-]{0,100}$"
BEGINNING, END = "the beginning", "the end"  # what a form says in place of a stage's name
OVERRIDE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*=[^\r\n]{1,1000}$"


def parse_overrides(lines: list[str]) -> dict[str, Any]:
    """Parse key=value lines by YAML 1.2, as params.yaml is read: 2e-6 is a number, none is a word, [1, 2] is a list.

    Raises ValueError for the first line that is not key=value, has an anchor, an alias or ${, repeats a key, or is not YAML.
    """
    values: dict[str, Any] = {}
    for line in lines:
        key, sign, text = line.partition("=")
        if not sign or not re.fullmatch(OVERRIDE, line):
            raise ValueError(f"the override {line!r} is not key=value, with a dotted key of params.yaml: stage2.steps=300")
        if re.search(r"(^|[\s\[{,:])[&*][A-Za-z0-9]", text):
            raise ValueError(f"the override {key} has an anchor or an alias of YAML (& or *); write the value itself")
        if "${" in text:
            raise ValueError(f"the override {key} holds ${{, which DVC or a shell would fill in; write the value itself")
        if key in values:
            raise ValueError(f"the override {key} is stated twice; keep one of the two")
        try:
            values[key] = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise ValueError(f"the override {line!r} has a value that is not YAML; quote text that holds : or [") from None
    return values


def _refuse_unreadable(lines: list[str]) -> list[str]:
    """Return the lines as they are; ValueError for what `parse_overrides` refuses, before there is a run."""
    parse_overrides(lines)
    return lines


class _KnownStages:
    """Makes a form offer the stages that dvc.yaml has when the form is made, which is at `cf deploy`. A run checks the names itself.

    `first` stands before them for no stage at all, because Prefect's form shows a list at once only where nothing can be null.
    """

    def __init__(self, *first: str) -> None:
        self.first = first

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        file, schema = Path("dvc.yaml"), dict(handler(core))
        names = list(read_yaml(file).get("stages") or {}) if file.is_file() else []
        return schema | ({"enum": [*self.first, *names]} if names else {})


Profile = Literal["params.yaml", "tiny", "smoke", "small", "wan-1.3b"]
StageName = Annotated[str, StringConstraints(pattern=STAGE), _KnownStages()]
FirstStage = Annotated[str, StringConstraints(pattern=f"^{BEGINNING}$|{STAGE}"), _KnownStages(BEGINNING)]
LastStage = Annotated[str, StringConstraints(pattern=f"^{END}$|{STAGE}"), _KnownStages(END)]
Override = Annotated[str, StringConstraints(pattern=OVERRIDE)]
Overrides = Annotated[list[Override], Field(max_length=50), AfterValidator(_refuse_unreadable)]


def describe_parameters(profile: str, overrides: list[str]) -> str:
    """Say in a line of Markdown which profile and overrides a run was asked for."""
    over = "overrides " + ", ".join(f"`{line}`" for line in overrides) if overrides else "no overrides"
    return f"Profile `{profile}`, {over}."


class RunConfig(BaseModel, extra="forbid"):
    """Which parameters and which stages one run takes. Everything that is not stated is as committed."""

    profile: Profile = Field("params.yaml", description="The parameters to start from: params.yaml as committed, or one of profiles/.")
    overrides: Overrides = Field(
        default_factory=list,
        description="Values laid over them, one key=value each, for example stage2.steps=300 or stage2.teacher.context=none.",
    )
    stages: list[StageName] = Field(
        default_factory=list,
        max_length=100,
        description="Only these stages, checked when the run begins; empty for all. What they need must have been made before.",
    )
    from_stage: FirstStage = Field(BEGINNING, description="Only this stage and what follows from it. Checked when the run begins.")
    to_stage: LastStage = Field(END, description="Only this stage and what leads to it. Checked when the run begins.")
    at_once: int = Field(4, ge=1, le=16, description="Independent stages at the same time, at most.")
    dry_run: bool = Field(False, description="Only say which stages would run, and why.")
    pull: bool = Field(False, description="Take a stage's result from the DVC remote, where another machine has made the same.")
    push: bool = Field(False, description="Afterwards send results and run cache to the DVC remote.")

    def select(self, graph: list[Stage]) -> list[Stage]:
        """Return the stages of the graph that the run takes. Raises ValueError for a name that is no stage."""
        first, last = (None if name in (BEGINNING, END) else name for name in (self.from_stage, self.to_stage))
        return select_stages(graph, self.stages, first, last)
