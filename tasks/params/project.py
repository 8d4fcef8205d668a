"""params.yaml and dvc.yaml, each read once and handed to everything that a stage needs them for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .yaml_file import fill_in_values, read_yaml

if TYPE_CHECKING:
    from .schema import Params


class Project:
    """The parameters and the stages of a project folder. Each file is parsed at its first use, and never again."""

    def __init__(self, file: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")) -> None:
        self.file, self.pipeline = file, pipeline

    @cached_property
    def tree(self) -> dict[str, Any]:
        """params.yaml as it is stated."""
        return read_yaml(self.file)

    @cached_property
    def params(self) -> Params:
        """params.yaml as types. The import is here because `cf --help` must not wait for torch."""
        from .load import validate_params

        return validate_params(self.tree, self.file)

    @cached_property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """The stages of dvc.yaml in running order, each as it is stated; none where there is no dvc.yaml."""
        return read_yaml(self.pipeline)["stages"] if self.pipeline.exists() else {}

    def stage(self, name: str) -> dict[str, Any]:
        """A stage of dvc.yaml with ${key} filled in; empty for a name that dvc.yaml does not have."""
        return fill_in_values(self.stages.get(name, {}), self.tree)
