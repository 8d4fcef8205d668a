"""infra/work-pools/: each template rendered by its own worker's code for a run, and what would be sent to Docker or to Kubernetes
caught by a server on loopback and judged: Kubernetes' own schemas for the one, field by field for the other (there is no published
schema of Docker's API that could be installed)."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import jsonschema
import kubernetes_asyncio
import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker
from prefect_docker.worker import DockerWorker
from prefect_kubernetes.worker import KubernetesWorker

from tests.infra.recorder import recorder

INFRA = Path(__file__).parents[2] / "infra"
WORKERS = {"process": ProcessWorker, "docker": DockerWorker, "kubernetes": KubernetesWorker}
VERSIONS = ("1.30.0", "1.37.0")  # the oldest and the newest whose schemas the package has, of those that still are in use
NOBODY: Any = object()  # without a client Prefect would start a server, to ask it nothing
# of Prefect's own templates: left out, and why. The rest must be in ours.
LEFT_OUT = {
    "process": set(),
    # a container with all rights, arguments that undo the others, and a password in a deployment
    "docker": {"privileged", "container_create_kwargs", "registry_credentials"},
    "kubernetes": set(),
}


def template(kind: str) -> dict[str, Any]:
    return json.loads((INFRA / f"work-pools/{kind}.json").read_text())


def placeholders(node: object) -> set[str]:
    return set(re.findall(r"{{ *(\w+) *}}", json.dumps(node)))


@pytest.mark.parametrize("kind", WORKERS)
def test_a_template_is_prefects_own_and_more(kind: str) -> None:
    ours, theirs = template(kind), WORKERS[kind].get_default_base_job_template()
    jsonschema.Draft202012Validator.check_schema(ours["variables"])
    known = set(ours["variables"]["properties"])
    assert placeholders(ours["job_configuration"]) == known, "a variable that nothing uses, or a place that nothing fills"
    missing = set(theirs["variables"]["properties"]) - known
    assert missing == LEFT_OUT[kind]
    for name, one in ours["variables"]["properties"].items():
        if one.get("default") is not None:
            jsonschema.validate(one["default"], {**one, "definitions": ours["variables"].get("definitions", {})}), name


def rendered(kind: str, **values: object) -> Any:
    """What a worker makes of a run whose deployment states these; refused as the server refuses them."""
    worker, ours = WORKERS[kind], template(kind)
    jsonschema.validate(values, ours["variables"] | {"additionalProperties": False})
    configuration = asyncio.run(worker.job_configuration.from_template_and_values(ours, values, client=NOBODY))
    run = FlowRun(id=uuid4(), name="brave-owl", flow_id=uuid4())
    configuration.prepare_for_flow_run(run)
    return configuration


# ----------------------------------------------------------------------------------------------------------- kubernetes


def job(monkeypatch: pytest.MonkeyPatch, password: str | None = None, **values: object) -> dict[str, Any]:
    """The Job as it leaves the worker."""

    async def create(address: str) -> None:
        settings = kubernetes_asyncio.client.Configuration(host=f"http://{address}")
        async with kubernetes_asyncio.client.ApiClient(settings) as client:
            await KubernetesWorker(work_pool_name="cf-kubernetes")._create_job(configuration, client)

    [worker] = [one for one in manifests() if one["kind"] == "Deployment"]
    for entry in worker["spec"]["template"]["spec"]["containers"][0]["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    with temporary_settings({PREFECT_API_AUTH_STRING: password} if password else {}), recorder() as (address, seen):
        configuration = rendered("kubernetes", **values)
        asyncio.run(create(address))
    [(path, body)] = seen
    assert path == f"/apis/batch/v1/namespaces/{values.get('namespace', 'default')}/jobs"
    return body


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [{}, {"gpus": 0, "image": "context-forcing:cpu", "tolerations": []}, {"gpus": 8, "shm_size": "64Gi"}])
def test_a_kubernetes_job_is_one_by_kubernetes_own_schema(monkeypatch: pytest.MonkeyPatch, version: str, values: dict[str, Any]) -> None:
    made = job(monkeypatch, **values)
    kubernetes_validate.validate(made, version, strict=True)
    pod = made["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpus", 1)
    assert container["image"] == values.get("image", "context-forcing:cuda")
    assert pod["automountServiceAccountToken"] is False, "a run has no business with the cluster"
    assert pod["securityContext"]["fsGroup"] == 1000, "the volume is the user's"
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": values.get("shm_size", "8Gi")}} in pod["volumes"]
    assert made["spec"]["completions"] == made["spec"]["parallelism"] == 1
    assert made["spec"]["backoffLimit"] == 0, "whether a run is tried again is Prefect's to say"


def test_prefects_own_job_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ours differs: completions and parallelism stand in the pod, where a strict server refuses them. When this fails, ours may
    go back to theirs."""
    theirs = KubernetesWorker.get_default_base_job_template()
    configuration = asyncio.run(KubernetesWorker.job_configuration.from_template_and_values(theirs, {}, client=NOBODY))
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="brave-owl", flow_id=uuid4()))
    with pytest.raises(kubernetes_validate.ValidationError, match=r"completions|parallelism"):
        kubernetes_validate.validate(configuration.job_manifest, VERSIONS[-1], strict=True)


def test_the_password_of_the_api_is_not_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(monkeypatch, password="cf:planted-password")
    kubernetes_validate.validate(made, VERSIONS[-1], strict=True)
    assert "planted-password" not in json.dumps(made)
    [stated] = [one for one in made["spec"]["template"]["spec"]["containers"][0]["env"] if one["name"] == "PREFECT_API_AUTH_STRING"]
    assert stated["valueFrom"]["secretKeyRef"] == {"name": "cf", "key": "PREFECT_API_AUTH_STRING"}


@pytest.mark.parametrize(
    "values",
    [{"gpus": -1}, {"gpus": "all"}, {"gpu": 1}, {"shm_size": "lots"}, {"claim": "a/b"}, {"secret": "x; y"}, {"image_pull_policy": "Maybe"}],
    ids=str,
)
def test_what_kubernetes_could_not_run_is_refused_with_the_deployment(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        rendered("kubernetes", **values)


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_cluster_needs_first(version: str) -> None:
    kinds = [one["kind"] for one in manifests()]
    assert kinds == ["PersistentVolumeClaim", "ServiceAccount", "Role", "RoleBinding", "Deployment"]
    for one in manifests():
        kubernetes_validate.validate(one, version, strict=True)
    ours = template("kubernetes")["variables"]["properties"]
    assert manifests()[0]["metadata"]["name"] == ours["claim"]["default"]
    [container] = manifests()[-1]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": ours["secret"]["default"]}}]


# --------------------------------------------------------------------------------------------------------------- docker


def container(**values: object) -> dict[str, Any]:
    """What Docker's engine would be asked to make."""
    configuration = rendered("docker", **values)
    worker = DockerWorker(work_pool_name="cf-docker")
    with recorder() as (address, seen):
        client = docker.DockerClient(base_url=f"tcp://{address}", version="1.43")
        client.containers.create(**worker._build_container_settings(client, configuration))
    [(path, body)] = seen
    assert path.startswith("/v1.43/containers/create?name=brave-owl")
    return body


@pytest.mark.parametrize("count", [1, 4, -1])
def test_a_container_gets_its_gpus_and_no_rights(count: int) -> None:
    made = container(devices=[{"Driver": "nvidia", "Count": count, "Capabilities": [["gpu"]]}])
    [request] = made["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["Count"], request["Capabilities"]) == ("nvidia", count, [["gpu"]])
    assert made["Image"] == "context-forcing:cuda" and made["User"] == "1000:1000"
    host = made["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"] and not host.get("Privileged")
    assert host["ShmSize"] == 8 * 2**30 and host["Init"] is True
    assert host["Binds"] == ["cf-work:/home/cf"], "a volume; no folder of the host, and not its docker socket"


def test_a_container_without_gpus() -> None:
    made = container(devices=[], image="context-forcing:cpu")
    assert not made["HostConfig"].get("DeviceRequests")
    assert made["Image"] == "context-forcing:cpu"


def test_a_container_is_told_where_the_server_is_and_nothing_of_the_workers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the rest stands in the volume (infra/README.md)."""
    for name in ("AWS_SECRET_ACCESS_KEY", "CF_REPOSITORY", "CF_ALERT_URL"):
        monkeypatch.setenv(name, "planted")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api", PREFECT_API_AUTH_STRING: "cf:password"}):
        made = container()
    assert "planted" not in json.dumps(made)
    assert {"PREFECT_API_URL=http://127.0.0.1:4200/api", "PREFECT_API_AUTH_STRING=cf:password"} <= set(made["Env"])
    assert made["HostConfig"]["NetworkMode"] == "host", "else 127.0.0.1 would be the container's own"
    assert "Entrypoint" not in made and made["Cmd"], "the image's own entrypoint makes the checkout"


@pytest.mark.parametrize(
    "values",
    [
        {"privileged": True},
        {"container_create_kwargs": {"cap_add": ["SYS_ADMIN"]}},
        {"devices": [{"Driver": "nvidia", "Count": -2, "Capabilities": [["gpu"]]}]},
        {"shm_size": "8 GB"},
    ],
    ids=str,
)
def test_what_a_deployment_may_not_ask_of_docker(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        rendered("docker", **values)


# -------------------------------------------------------------------------------------------------------------- process


def test_a_process_runs_prefects_command_and_no_other_by_default() -> None:
    made = rendered("process")
    assert made.command == f"{sys.executable} -m prefect.engine" and made.stream_output
