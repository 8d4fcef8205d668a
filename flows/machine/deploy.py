"""`cf deploy`: the deployments of infra/prefect.yaml, with cron and timezone from params.yaml, sent to this machine's server.

PREFECT_API_URL, CF_POOL and CF_ROOT, where they are stated, name another server, another work pool, and the project's folder on the
machines that work for it (infra/README.md). What was paused stays paused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.machine import settings
from flows.machine.settings import process_environment, read_machine
from flows.machine.up import POOL
from flows.project import overrides

DEPLOYMENTS = Path(__file__).parents[2] / "infra/prefect.yaml"
WIDE = {"COLUMNS": "1000"}  # Prefect folds what it says at 80 columns
EMPTY = ("For further information visit", "An exception occurred.")  # beginnings of its last lines that say nothing


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("cf deploy", description=__doc__, formatter_class=form).parse_args(argv)
    machine = read_machine()
    env = process_environment(machine) | WIDE | read_places(machine.root, os.environ)
    env["PREFECT_API_URL"] = os.environ.get("PREFECT_API_URL", env["PREFECT_API_URL"]).rstrip("/")
    whole = YAML(typ="safe", pure=True).load(DEPLOYMENTS)
    refuse_incomplete(whole["deployments"], machine.root, env)
    validate_params(machine.root, env)
    env |= read_schedule(machine.root)
    paused = keep_paused(whole["deployments"], env)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "prefect.yaml").write_text(json.dumps(whole))  # JSON is YAML
        run_module(["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)], machine.root, env, "prefect deploy")
    at = f"{env['PREFECT_API_URL'].removesuffix('/api')}/deployments"
    print(f"deployed {', '.join(one['name'] for one in whole['deployments'])} to work pool {env['CF_POOL']}: {at}")
    if paused:
        print(f"still paused, as before: {', '.join(paused)}; resume it at {at}")


def read_places(root: Path, given: Mapping[str, str]) -> dict[str, str]:
    pool, folder = given.get("CF_POOL", POOL), given.get("CF_ROOT", str(root))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", pool):
        raise ValueError(f"CF_POOL is {pool!r}; name a work pool, in letters, digits and . _ -")
    if not re.fullmatch(r"/[^{}\r\n]*", folder):
        raise ValueError(f"CF_ROOT is {folder!r}; state the project's whole path on the machines that work for the pool, from / on")
    return {"CF_POOL": pool, "CF_ROOT": folder}


def read_schedule(root: Path) -> dict[str, str]:
    stated = overrides.read((root / "params.yaml").read_text()).get("nightly")
    if not isinstance(stated, dict) or not {"cron", "timezone"} <= stated.keys():
        raise ValueError("params.yaml states no nightly.cron and nightly.timezone; `cf profile use tiny` writes a file that does")
    return {"CF_NIGHTLY_CRON": str(stated["cron"]), "CF_NIGHTLY_TIMEZONE": str(stated["timezone"])}


# --------------------------------------------------------------------- before: Prefect deploys one after the other, and stops midway


def refuse_incomplete(deployments: list[dict[str, Any]], root: Path, env: dict[str, str]) -> None:
    """The server, the work pool, and the flows."""
    for one in deployments:
        if not (root / (file := one["entrypoint"].partition(":")[0])).is_file():
            raise ValueError(f"{root} has no {file}; run cf deploy at the root of a whole checkout")
    pools = [pool["name"] for pool in ask_server(env, "/work_pools/filter", {})]
    if env["CF_POOL"] not in pools:
        way = "`make up` makes it" if env["CF_POOL"] == POOL else "infra/README.md says how to make one"
        raise ValueError(f"{env['PREFECT_API_URL']} has no work pool {env['CF_POOL']}; {way} (there: {', '.join(pools) or 'none'})")


def validate_params(root: Path, env: dict[str, str]) -> None:
    """As the flow does it (flows/pipeline.py); a project without it has nothing to check."""
    if (root / "tasks/validate.py").exists():
        with tempfile.TemporaryDirectory() as folder:  # not where the stage of that name writes
            run_module(["tasks", "validate", "--out", f"{folder}/params.json"], root, env, "cf validate")


def keep_paused(deployments: list[dict[str, Any]], env: dict[str, str]) -> list[str]:
    """States in them what is paused at the server, so that it is at no moment resumed; the names of those."""
    wanted = {"deployments": {"name": {"any_": [one["name"] for one in deployments]}}}
    at_server = {(one["name"], one["entrypoint"]): one for one in ask_server(env, "/deployments/filter", wanted)}
    paused = []
    for one in deployments:
        known = at_server.get((one["name"], one["entrypoint"]), {})
        off = {schedule["slug"] for schedule in known.get("schedules", []) if not schedule["active"]}
        one["paused"] = bool(known.get("paused"))
        for schedule in one.get("schedules", []):
            schedule["active"] = schedule["slug"] not in off
        if one["paused"] or not all(schedule["active"] for schedule in one.get("schedules", [])):
            paused.append(one["name"])
    return paused


def ask_server(env: dict[str, str], path: str, body: dict[str, Any]) -> Any:
    """The API, or in one sentence why not."""
    url = env["PREFECT_API_URL"]
    try:
        return settings.post_json(env, path, body, timeout=30)
    except urllib.error.HTTPError as error:
        way = "state its USER:PASSWORD as PREFECT_API_AUTH_STRING" if error.code == 401 else "try again, and look at its log"
        raise ValueError(f"{url} answers {error.code} {error.reason}; {way}") from None
    except (OSError, ValueError):
        raise ValueError(f"no Prefect server answers at {url}; `cf up` starts this machine's") from None


def run_module(words: list[str], root: Path, env: dict[str, str], name: str) -> None:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = [line.strip(" │╭╮╰╯─") for line in done.stdout.splitlines()]
        nothing = f"it ended with {done.returncode} and said nothing"
        last = next((line for line in reversed(said) if line and not line.startswith(EMPTY)), nothing)
        raise ValueError(f"{name} failed: {last.removeprefix(f'{name}: ')[-1500:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
