"""The project of four stages, and what the server says of a run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.logging.handlers import APILogWorker

from flows.pipeline import pipeline
from flows.run.config import RunConfig
from tests.flows import project

ALL = dict.fromkeys(project.STAGES, "Completed")


@pytest.fixture
def root(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(project.make(tmp_path / "project", seconds=0.5), monkeypatch)


@pytest.fixture
def done_root(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All stages were made, by `dvc repro`."""
    return enter(project.make_done(tmp_path / "project"), monkeypatch)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for key in [key for key in os.environ if key.startswith(("CF_", "CUDA_"))]:
        monkeypatch.delenv(key)
    return folder


def go(**asked: Any) -> Any:
    """The flow run's final state; `.state_details.flow_run_id` names the run."""
    return pipeline(RunConfig(**asked), return_state=True)


class Seen:
    """What the server knows of a run."""

    def __init__(self, run: Any) -> None:
        with get_client(sync_client=True) as client:
            one = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
            until = time.monotonic() + 20
            while True:  # states of tasks travel as events, and arrive when they arrive
                self.tasks = {task.name: task for task in client.read_task_runs(flow_run_filter=one)}
                if all(task.state and task.state.is_final() for task in self.tasks.values()) or time.monotonic() > until:
                    break
                time.sleep(0.2)
            APILogWorker.drain_all(timeout=30, at_exit=False)  # or they would be sent every two seconds
            self.logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
            only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            self.artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=only)}

    def states(self) -> dict[str, tuple[str, str]]:
        return {name: (str(task.state.type.value), task.state.name) for name, task in self.tasks.items()}

    def lines(self, stage: str) -> list[str]:
        return [log.message for log in self.logs if log.task_run_id == self.tasks[stage].id]


def seen(state: Any) -> Seen:
    return Seen(state.state_details.flow_run_id)


def change(root: Path, before: str, after: str, file: str = "params.yaml") -> None:
    text = (root / file).read_text()
    assert before in text
    (root / file).write_text(text.replace(before, after))


def rows(artifact: Any) -> list[dict[str, Any]]:
    """Of a table."""
    return json.loads(artifact.data) if isinstance(artifact.data, str) else artifact.data
