"""Two machines that run the same pipeline under Prefect, and a real S3 server between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.pipeline import pipeline
from flows.project import dvc_remote
from flows.run.config import RunConfig
from tests.flows.s3 import BUCKET, CREDENTIALS, FEW, Machine, Store, commit, source

pytestmark = pytest.mark.slow


@pytest.fixture
def machines(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Machine, Machine]]:
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(dvc_remote, "push_task", dvc_remote.push_task.with_options(retry_delay_seconds=0))
    with Store(tmp_path) as store:
        origin = source(tmp_path / "origin", FEW)
        dvc_remote.add_remote(origin, "lab", f"s3://{BUCKET}/cf", endpoint=store.url)
        commit(origin)
        yield store, Machine(origin, tmp_path / "one"), Machine(origin, tmp_path / "two")


def run(machine: Machine, monkeypatch: pytest.MonkeyPatch, **config: object) -> tuple[Any, dict[str, str]]:
    """How the run ended, and the states of its tasks, as the server has them."""
    monkeypatch.chdir(machine.root)
    state = pipeline(RunConfig.model_validate(config), return_state=True)

    async def tasks() -> dict[str, str]:
        async with get_client() as client:
            ours = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            until = time.monotonic() + 20
            while True:  # states of tasks travel as events, and arrive when they arrive
                found = await client.read_task_runs(flow_run_filter=ours)
                if all(one.state and one.state.is_final() for one in found) or time.monotonic() > until:
                    return {one.name: one.state_name or "" for one in found}
                await asyncio.sleep(0.2)

    return state, asyncio.run(tasks())


def test_a_machine_restores_what_another_has_made(machines: tuple[Store, Machine, Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, two = machines
    state, seen = run(one, monkeypatch, push=True)
    assert state.is_completed() and seen["push"] == "Completed"
    state, seen = run(two, monkeypatch, pull=True)
    assert state.result() == dict.fromkeys(("clips", "teacher", "report"), "Restored")
    assert {seen[name] for name in ("clips", "teacher", "report")} == {"Restored"}
    assert two.ran() == [] and two.results() == one.results()


def test_without_the_remote_the_stages_are_made_and_stay_finished(
    machines: tuple[Store, Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, one, _ = machines
    store.kill()
    state, seen = run(one, monkeypatch, pull=True, push=True)
    assert one.ran() == ["clips", "teacher", "report"]
    assert {seen[name] for name in ("clips", "teacher", "report")} == {"Completed"} and seen["push"] == "Failed"
    assert state.is_failed()
    assert "the stages are finished and not sent: remote lab (s3://clips/cf) doesn't answer at " in state.message
    store.start()
    state, seen = run(one, monkeypatch, push=True)
    assert state.is_completed() and len(one.ran()) == 3, "the next run sends it"
    assert len(store.objects()) == FEW + 5 + 1 + 3


def test_what_was_finished_before_a_stage_failed_is_sent(machines: tuple[Store, Machine, Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, two = machines
    for machine in (one, two):
        text = (machine.root / "dvc.yaml").read_text()
        (machine.root / "dvc.yaml").write_text(text.replace("stage.py report 1", "stage.py report one"))
    state, seen = run(one, monkeypatch, push=True)
    assert state.is_failed() and "report failed" in state.message and seen["push"] == "Completed"
    run(two, monkeypatch, pull=True)
    assert two.ran() == ["report"], "and only that was tried"
