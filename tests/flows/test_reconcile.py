"""A real server is told of runs whose processes are gone, someone of the night among them; and it knows of nights on other machines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from prefect.states import Completed, Running

from flows.machine import alerts, reconcile
from tests.week.machine import Receiver


@flow(name="nightly")
def a_night() -> None: ...


@flow(name="pipeline")
def a_run() -> None: ...


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Receiver]:
    listening = Receiver()
    monkeypatch.setenv(alerts.ALERT_URL, listening.url)
    monkeypatch.chdir(tmp_path)
    yield listening
    listening.stop()


def test_a_night_that_died_with_its_worker_is_told(server: None, receiver: Receiver, tmp_path: Path) -> None:
    with get_client(sync_client=True) as client:
        runs = [client.create_flow_run(one, state=Running()) for one in (a_night, a_run, a_night)]
        log = "".join(f"submitting flow run '{run.id}'\n" for run in runs[:2])  # the third is another machine's
        (tmp_path / ".machine").mkdir()
        (tmp_path / ".machine/worker.log").write_text(log)
        assert reconcile.close_dead_runs(client, tmp_path, timedelta(minutes=2)) == [], "a worker may be about to start them"
        said = reconcile.close_dead_runs(client, tmp_path)
        assert len(said) == 2 and all("it is Crashed now" in line for line in said)
        states = [client.read_flow_run(run.id).state for run in runs]
        assert [state and state.name for state in states] == ["Crashed", "Crashed", "Running"]
    (heard,) = receiver.heard
    assert heard["event"] == "crashed" and heard["run"] == str(runs[0].id)
    with get_client(sync_client=True) as client:
        assert reconcile.close_dead_runs(client, tmp_path) == [] and len(receiver.heard) == 1


def test_a_night_elsewhere_is_no_absence(server: None, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alerts.record_end(tmp_path, "Promoted", good=True)
    now = time.time()
    monkeypatch.setattr(alerts.time, "time", lambda: now + 27 * 3600)
    monkeypatch.setenv("PREFECT_API_URL", str(get_current_settings().api.url))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs():  # nights of other tests on the same server
            client.delete_flow_run(run.id)
        client.create_flow_run(a_night, state=Completed(name="StillRunning"))
        assert "for 27.0 hours" in (alerts.report_absence(tmp_path, 26) or ""), "which did nothing"
        client.create_flow_run(a_run, state=Completed())
        assert alerts.last_good_end_elsewhere() == 0.0
        client.create_flow_run(a_night, state=Completed(name="NoNewData"))
    assert abs(alerts.last_good_end_elsewhere() - now) < 60 and alerts.report_absence(tmp_path, 26) is not None
    monkeypatch.setattr(alerts.time, "time", lambda: now + 25 * 3600)
    (tmp_path / alerts.STATE_FILE).write_text('{"since": 0}')
    assert alerts.report_absence(tmp_path, 26) is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "nonsense"])
def test_a_server_that_does_not_answer_knows_of_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    assert alerts.last_good_end_elsewhere() == 0.0
