"""`cf deploy`, to a real server for which nobody works."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import threading
from base64 import b64encode
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from prefect.client.orchestration import get_client
from prefect.server.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL

from flows.machine import deploy
from tasks.params.yaml_file import read_yaml
from tests.flows import project
from tests.preloaded import PreloadedPython

CRON = "30 2 * * *"
NAMES = {"evaluate", "nightly", "pipeline"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project of four stages with the flows of this tree; no server is stated."""
    root = project.make(tmp_path / "project")
    shutil.copytree(project.ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "params.yaml").open("a") as file:
        file.write(f'nightly: {{cron: "{CRON}", timezone: Europe/Berlin, inbox: inbox}}\n')
    for name in [name for name in os.environ if name.startswith(("CF_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(root)
    monkeypatch.setattr(deploy, "sys", PreloadedPython())
    return root


@pytest.fixture
def api(server: None, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = str(PREFECT_API_URL.value())
    monkeypatch.setenv("PREFECT_API_URL", url)
    with get_client(sync_client=True) as client:  # what other tests have deployed
        for one in client.read_deployments():
            client.delete_deployment(one.id)
    for name, kind in (("cf", "process"), ("cf-docker", "docker")):
        template = json.loads((project.ROOT / f"infra/work-pools/{kind}.json").read_text())
        if name not in [pool["name"] for pool in call(url, "/work_pools/filter")]:
            call(url, "/work_pools/", {"name": name, "type": kind, "base_job_template": template})
    return url


def call(url: str, path: str, body: Any = None) -> Any:
    return deploy.ask_server({"PREFECT_API_URL": url}, path, body or {})


def deployed(url: str) -> dict[str, Any]:
    return {one["name"]: one for one in call(url, "/deployments/filter")}


@pytest.mark.slow
def test_what_is_refused_is_refused_before_anything_is_deployed(api: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        with pytest.raises(ValueError) as said:
            deploy.main([])
        assert "\n" not in str(said.value) and not deployed(api)
        return str(said.value)

    params = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(params.replace("seed: 1", "seed: -1"))
    assert refused() == "cf validate failed: params.yaml: seed is -1; it must be 0 or more"
    (checkout / "params.yaml").write_text(params)
    flow = (checkout / "flows/pipeline.py").read_text()
    (checkout / "flows/pipeline.py").write_text(f"{flow}\nthis is no Python\n")
    said = refused()
    assert said.startswith("prefect deploy failed: ") and "invalid syntax" in said and "│" not in said
    (checkout / "flows/pipeline.py").write_text(flow)
    for name, value, words in (
        ("CF_POOL", "lab", f"{api} has no work pool lab; infra/README.md says how to make one (there: cf, cf-docker)"),
        ("CF_POOL", "{{ x }}", "CF_POOL is '{{ x }}'; it must be a work pool's name in letters, digits and . _ -"),
        ("CF_ROOT", "here", "CF_ROOT is 'here'; it must be the project's whole path on the machines that work for the pool, from / on"),
    ):
        with monkeypatch.context() as stated:
            stated.setenv(name, value)
            assert refused() == words
    (checkout / "flows/evaluate.py").rename(checkout / "flows/elsewhere.py")
    assert refused() == f"{checkout} has no flows/evaluate.py; run cf deploy at the root of a whole checkout"
    with socket.socket() as nobody, monkeypatch.context() as stated:
        nobody.bind(("127.0.0.1", 0))
        stated.setenv("PREFECT_API_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}/api")
        (checkout / "flows/elsewhere.py").rename(checkout / "flows/evaluate.py")
        assert refused().startswith("no Prefect server answers at ")


@pytest.mark.slow
def test_what_is_paused_stays_paused(api: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deploy.main([])
    first = deployed(api)
    assert set(first) == NAMES and {one["work_pool_name"] for one in first.values()} == {"cf"}
    [schedule] = first["nightly"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"], schedule["active"]) == (CRON, "Europe/Berlin", True)
    assert not any(one["paused"] for one in first.values())
    assert "paused" not in capsys.readouterr().out
    call(api, f"/deployments/{first['pipeline']['id']}/pause_deployment")
    deploy.main([])
    assert {name for name, one in deployed(api).items() if one["paused"]} == {"pipeline"}
    assert "still paused, as before: pipeline; resume it at " in capsys.readouterr().out
    call(api, f"/deployments/{first['pipeline']['id']}/resume_deployment")
    with get_client(sync_client=True) as client:  # as the switch in the UI does it: of the schedule, not of the deployment
        nightly = client.read_deployment_by_name("nightly/nightly")
        client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=False)
    deploy.main([])
    assert not any(one["paused"] for one in deployed(api).values())
    assert [one["active"] for one in deployed(api)["nightly"]["schedules"]] == [False]
    assert "still paused, as before: nightly; resume it at " in capsys.readouterr().out
    with get_client(sync_client=True) as client:
        client.update_deployment_schedule(nightly.id, client.read_deployment(nightly.id).schedules[0].id, active=True)
    deploy.main([])
    assert [one["active"] for one in deployed(api)["nightly"]["schedules"]] == [True]


@pytest.mark.slow
def test_nights_wait_for_an_inbox_and_what_they_will_do_is_said(
    api: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody who deploys for the forms is not to find a training and a push in the morning; and no deployment is a run of W&B."""
    asked: list[dict[str, str]] = []
    really = deploy.run_module
    monkeypatch.setattr(deploy, "run_module", lambda words, root, env, name: (asked.append(env), really(words, root, env, name)))
    params = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(params.replace("inbox: inbox", "inbox: null"))
    project.git(checkout, "remote", "add", "origin", "https://me:secret@git.example/cf")
    project.dvc(checkout, "remote", "add", "-q", "-d", "lab", "/nowhere")

    def active() -> list[bool]:
        deploy.main([])
        return [one["active"] for one in deployed(api)["nightly"]["schedules"]]

    for _ in range(2):
        assert active() == [False]
        said = capsys.readouterr().out
        assert (
            "nights are paused (new clips from no inbox, profile tiny, pushes data to the DVC remote lab and its branch and tags to" in said
        )
        assert "origin (https://git.example/cf)); name a folder as nightly.inbox" in said and "secret" not in said
    assert asked[0]["WANDB_MODE"] == "disabled"
    (checkout / "params.yaml").write_text(params)
    assert active() == [True]
    said = capsys.readouterr().out
    assert re.search(r"the next night is 20\d\d-\d\d-\d\d 02:30 Europe/Berlin: new clips from inbox, profile tiny, pushes data", said), said
    (checkout / "params.yaml").write_text(params.replace("inbox: inbox", "inbox: null"))
    assert active() == [True], "it was at work: that is for a person to stop"


@pytest.mark.slow
def test_forms_offer_the_stages_and_say_what_each_field_is(api: str, checkout: Path) -> None:
    deploy.main([])
    schemas = {name: one["parameter_openapi_schema"] for name, one in deployed(api).items()}
    nightly = schemas["nightly"]["properties"]
    assert nightly["date"]["type"] == "string" and nightly["date"]["description"].startswith("Of the night")
    assert nightly["full"]["description"].startswith("Train everything anew")
    for flow, fields in (("pipeline", ("from_stage", "to_stage", "stages")), ("evaluate", ("stage", "measured"))):
        (config,) = schemas[flow]["definitions"].values()
        for field in fields:
            assert str(project.STAGES)[1:] in str(config["properties"][field]), field
        for name, first in (("from_stage", "the beginning"), ("to_stage", "the end")) if flow == "pipeline" else ():
            # a list at once: beside null the form shows a button first, which has to be pressed
            assert config["properties"][name]["enum"] == [first, *project.STAGES] and config["properties"][name]["default"] == first
        for name, field in config["properties"].items():
            assert "description" in field and not re.search(r"[^`]student@", field["description"]), f"{name}: a mail link"


@pytest.mark.slow
def test_deployments_for_containers(api: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CF_POOL", "cf-docker")
    monkeypatch.setenv("CF_ROOT", "/home/cf/context-forcing")
    deploy.main([])
    there = deployed(api)
    assert set(there) == NAMES and {one["work_pool_name"] for one in there.values()} == {"cf-docker"}
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "/home/cf/context-forcing"}}
    assert all(one["pull_steps"] == [step] for one in there.values())
    assert f"to work pool cf-docker: {api.removesuffix('/api')}/deployments" in capsys.readouterr().out


@pytest.mark.parametrize("day", ["2026-03-27", "2026-10-23"])
def test_there_is_one_night_on_each_date_when_clocks_are_changed(day: str) -> None:
    """Half past two comes not at all, and twice: by Prefect's scheduler, and by what `cf deploy` says."""
    start = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZoneInfo("Europe/Berlin"))
    nights = asyncio.run(CronSchedule(cron=CRON, timezone="Europe/Berlin").get_dates(n=4, start=start))
    assert [night.astimezone(start.tzinfo).date().toordinal() - start.date().toordinal() for night in nights] == [1, 2, 3, 4]
    for before, night in pairwise([start, *nights]):
        said = deploy.find_next_night(CRON, "Europe/Berlin", before + timedelta(minutes=1))
        assert said.timestamp() == night.timestamp() and str(said.tzinfo) == "Europe/Berlin"
    hours = [(after.timestamp() - before.timestamp()) / 3600 for before, after in pairwise(nights)]
    assert max(hours) <= 25, "less than any profile's absent_hours, so that a night of 25 hours is no absence"
    for profile in (project.ROOT / "profiles").glob("*.yaml"):
        assert read_yaml(profile)["nightly"]["absent_hours"] > 25


def test_the_password_goes_along_and_into_no_sentence() -> None:
    """A server that wants another one."""
    seen = list[str | None]()

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["authorization"])
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with pytest.raises(ValueError, match="answers 401 Unauthorized; state its USER:PASSWORD as PREFECT_API_AUTH_STRING") as said:
            deploy.ask_server({"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": "cf:planted"}, "/work_pools/filter", {})
        server.shutdown()
    assert seen == [f"Basic {b64encode(b'cf:planted').decode()}"] and "planted" not in str(said.value)


def test_the_cron_is_that_of_params(checkout: Path) -> None:
    assert deploy.read_nightly(checkout) == {"cron": CRON, "timezone": "Europe/Berlin", "inbox": "inbox"}
    (checkout / "params.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"states no nightly\.cron"):
        deploy.read_nightly(checkout)
