"""infra/compose.yaml: the compose specification's types (compose-spec), a linter for its safety (compose-lint), and our own rules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import compose_spec
import pytest
import yaml

from flows.machine import settings
from tests.flows import project
from tests.flows.s3 import Store
from tests.infra.composed import FILE, SECRETS, Missing, compose, filled

SERVICES = compose()["services"]


def test_it_is_compose() -> None:
    read = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    assert read.service_names() == ["bucket", "postgres", "server", "store", "watch", "worker", "worker-gpu"]


@pytest.mark.parametrize(("good", "bad"), [("interval: 5s", "intervall: 5s"), ("cap_drop:", "capdrop:"), ("_healthy}", "_fine}")])
def test_it_would_not_be_compose(good: str, bad: str) -> None:
    whole = yaml.safe_load(filled(FILE.read_text().replace(good, bad), SECRETS))
    with pytest.raises(ValueError, match=bad.strip("}").split(":")[0]):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump({key: value for key, value in whole.items() if not key.startswith("x-")}))


def test_the_linter_finds_nothing_that_matters() -> None:
    """Left are digests of images, which nobody could look up here, and the object store's own writable root."""
    done = subprocess.run(["compose-lint", "check", "--format", "json", str(FILE)], capture_output=True, text=True, timeout=60)
    found = {(one["rule_id"], one["service"]) for one in json.loads(done.stdout)["findings"]}
    digests = {("CL-0019", name) for name in SERVICES}
    assert found == digests | {("CL-0007", "store")}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_reached_from_this_host_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert "network_mode" not in SERVICES[name] and "privileged" not in SERVICES[name]
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or source == "./bucket.py", "no folder of the host, and not its docker socket"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_those_that_are_well(name: str) -> None:
    service = SERVICES[name]
    for other, how in service.get("depends_on", {}).items():
        needed = "service_completed_successfully" if other == "bucket" else "service_healthy"
        assert how == {"condition": needed}
        assert other == "bucket" or "healthcheck" in SERVICES[other]
    assert ("healthcheck" in service) == (name in ("postgres", "server", "store"))
    assert re.search(r":(\d+\.\d+|cpu$|cuda$)", service["image"]), "a pinned tag"
    assert service["mem_limit"] and service["pids_limit"] and service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_is_not_stated_stops_it(name: str) -> None:
    with pytest.raises(Missing, match=f"{name} is "):
        compose(**{name: ""})


def test_secrets_come_from_the_environment_and_go_only_where_they_are_used() -> None:
    assert not any(secret in FILE.read_text() for secret in SECRETS.values())
    told = {name: json.dumps(SERVICES[name]) for name in SERVICES}
    knows = {secret: {name for name in told if SECRETS[secret] in told[name]} for secret in SECRETS}
    workers = {"worker", "worker-gpu"}
    assert knows["POSTGRES_PASSWORD"] == {"postgres", "server"}
    assert knows["PREFECT_AUTH"] == {"server", "watch"} | workers
    assert knows["STORE_SECRET"] == {"store", "bucket"} | workers
    ignored = subprocess.run(["git", "check-ignore", "infra/.env"], cwd=FILE.parents[1], capture_output=True, text=True)
    assert ignored.stdout.strip() == "infra/.env"


def test_a_gpu_worker_hands_over_through_the_store_only() -> None:
    one, other = SERVICES["worker"], SERVICES["worker-gpu"]
    assert set(one["volumes"]).isdisjoint(other["volumes"])
    [device] = other["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert other["profiles"] == ["gpu"] and "deploy" not in one
    assert other["shm_size"] == "8g", "Docker's own 64 MB are too little for NCCL"


def test_the_server_is_told_what_this_machines_own_is_told() -> None:
    stated = compose(PREFECT_PORT="4321")["services"]["server"]["environment"]
    own = settings.process_environment(settings.Machine(FILE.parents[1], "127.0.0.1", 4321, 1), {})
    for name in ("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"):
        assert stated[name] == own[name]
    # pages of other sites may not use the API; * is the default
    assert own["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4321,http://localhost:4321"
    assert stated["PREFECT_UI_API_URL"] == "http://127.0.0.1:4321/api"


def test_the_watch_begins(tmp_path: Path) -> None:
    """Its command, in a checkout that is somewhere else."""
    shell, option, words = SERVICES["watch"]["command"]
    assert (shell, option) == ("sh", "-c") and words.startswith("cd /home/cf/context-forcing && ")
    checkout = project.make(tmp_path / "context-forcing")
    (checkout / "params.yaml").write_text("nightly: {absent_hours: 26.0}\n")
    env = project.environment(CF_ALERT_URL=SERVICES["watch"]["environment"]["CF_ALERT_URL"])
    command = [shell, option, words.replace("/home/cf/context-forcing", str(checkout))]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as watch:
        try:
            until = time.monotonic() + 60
            while not (checkout / ".runs/nightly.json").exists() and watch.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            assert watch.poll() is None, "it ended"
            assert (checkout / ".runs/nightly.json").exists(), "it looked nowhere"
        finally:
            watch.kill()


def test_the_bucket_is_made_once(tmp_path: Path) -> None:
    """What the service `bucket` runs, on a real S3 server."""
    stated = SERVICES["bucket"]["environment"]
    assert SERVICES["bucket"]["volumes"] == ["./bucket.py:/opt/bucket.py:ro"]
    with Store(tmp_path) as store:
        env = {**stated, "PATH": os.environ["PATH"], "AWS_ENDPOINT_URL_S3": store.url}
        for _ in range(2):  # every `up` runs it
            subprocess.run([sys.executable, str(FILE.with_name("bucket.py"))], env=env, check=True, timeout=120)
        assert stated["BUCKET"] in [one["Name"] for one in store.client().list_buckets()["Buckets"]]
