"""`cf deploy`: the deployments of infra/prefect.yaml, with cron and timezone from params.yaml, sent to this machine's server.

PREFECT_API_URL, CF_POOL and CF_ROOT, where they are set, name another server, another work pool, and the project's folder on the
machines that work for it (infra/README.md). What was paused stays paused.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from ruamel.yaml import YAML

from flows.machine.settings import post_json, process_environment, read_machine
from flows.machine.up import POOL
from flows.project.dvc_command import read_config
from flows.project.git import run_git
from tasks.files.options import parse_options
from tasks.files.settings import read_settings
from tasks.params import yaml_file

DEPLOYMENTS = Path(__file__).parents[2] / "infra/prefect.yaml"
WIDE = {"COLUMNS": "1000"}  # Prefect folds its lines at 80 columns
WAITS = "waits for an inbox"  # tag of a deployment that nobody has paused but its first `cf deploy`
EMPTY = ("For further information visit", "An exception occurred.")  # beginnings of its last lines that say nothing


def main(argv: list[str]) -> None:
    parse_options("deploy", argv, __doc__)
    machine, values = read_machine(), read_settings()
    env = process_environment(machine) | WIDE | {"CF_POOL": values.pool, "CF_ROOT": values.root or str(machine.root)}
    env["PREFECT_API_URL"] = os.environ.get("PREFECT_API_URL", env["PREFECT_API_URL"]).rstrip("/")
    config = YAML(typ="safe", pure=True).load(DEPLOYMENTS)
    # Prefect sends one deployment after the other and stops midway, so everything is checked before
    refuse_incomplete(config["deployments"], machine.root, env)
    if (machine.root / "tasks/validate.py").exists():  # as the flow does (flows/run/repro.py)
        with tempfile.TemporaryDirectory() as folder:  # not where the stage of that name writes
            quiet = env | {"WANDB_MODE": "disabled"}  # no run for a question
            run_module(["tasks", "validate", "--out", f"{folder}/params.json"], machine.root, quiet, "cf validate")
    nightly = read_nightly(machine.root)
    env |= {"CF_NIGHTLY_CRON": str(nightly["cron"]), "CF_NIGHTLY_TIMEZONE": str(nightly["timezone"])}
    paused = keep_paused(config["deployments"], env, bool(nightly.get("inbox")))
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "prefect.yaml").write_text(json.dumps(config))  # JSON is YAML
        run_module(["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)], machine.root, env, "prefect deploy")
    page = f"{env['PREFECT_API_URL'].removesuffix('/api')}/deployments"
    names = ", ".join(deployment["name"] for deployment in config["deployments"])
    print(f"deployed {names} to work pool {env['CF_POOL']}: {page}")
    if before := [name for name, new in paused.items() if not new]:
        print(f"still paused, as before: {', '.join(before)}; resume it at {page}")
    print(describe_nights(machine.root, nightly, paused.get("nightly"), page))


def describe_nights(root: Path, nightly: dict[str, Any], paused: bool | None, page: str) -> str:
    """Say when the next night is, what it trains and where it pushes. `paused` is True for want of an inbox, False by a person."""
    profile, pushes = yaml_file.read_yaml(root / "params.yaml").get("profile"), list[str]()
    with suppress(RuntimeError):
        if name := read_config(root).get("core.remote"):
            pushes.append(f"data to the DVC remote {name}")
    with suppress(RuntimeError):
        if "origin" in run_git(root, "remote").split():
            origin = re.sub(r"//[^/@]*@", "//", run_git(root, "remote", "get-url", "origin").strip())  # without a password
            pushes.append(f"its branch and tags to origin ({origin})")
    inbox = nightly.get("inbox") or "no inbox"
    what = f"new clips from {inbox}, profile {profile}, pushes {' and '.join(pushes) or 'nothing'}"
    if paused is not None:
        name_one = f"name a folder as nightly.inbox in params.yaml and say `cf deploy` again, or resume it at {page}"
        return f"nights are paused ({what}); {name_one if paused else 'resume it there'}"
    os.environ.setdefault("PREFECT_HOME", str(root / ".machine/prefect"))  # which is made when Prefect is imported
    cron, timezone = str(nightly["cron"]), str(nightly["timezone"])
    return f"the next night is {find_next_night(cron, timezone, datetime.now(ZoneInfo(timezone))):%Y-%m-%d %H:%M} {timezone}: {what}"


def find_next_night(cron: str, timezone: str, now: datetime) -> datetime:
    """Return when Prefect's scheduler starts the next night, by its own class, because cron libraries differ where clocks change."""
    from prefect.server.schemas.schedules import CronSchedule  # takes a second

    nights = asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(n=2, start=now))
    return next(night for night in nights if night > now).astimezone(ZoneInfo(timezone))  # the first may have begun an hour early


def read_nightly(root: Path) -> dict[str, Any]:
    """Return the section nightly of params.yaml. Raises ValueError where it states no cron and timezone."""
    nightly = yaml_file.read_yaml(root / "params.yaml").get("nightly")
    if not isinstance(nightly, dict) or not {"cron", "timezone"} <= nightly.keys():
        raise ValueError("params.yaml states no nightly.cron and nightly.timezone; `cf profile use tiny` writes a file that does")
    return nightly


def refuse_incomplete(deployments: list[dict[str, Any]], root: Path, env: dict[str, str]) -> None:
    """Refuse if a flow's file, the server or the work pool is missing."""
    for deployment in deployments:
        if not (root / (file := deployment["entrypoint"].partition(":")[0])).is_file():
            raise ValueError(f"{root} has no {file}; run cf deploy at the root of a whole checkout")
    pools = [pool["name"] for pool in ask_server(env, "/work_pools/filter", {})]
    if env["CF_POOL"] not in pools:
        way = "`make up` makes it" if env["CF_POOL"] == POOL else "infra/README.md says how to make one"
        raise ValueError(f"{env['PREFECT_API_URL']} has no work pool {env['CF_POOL']}; {way} (there: {', '.join(pools) or 'none'})")


def keep_paused(deployments: list[dict[str, Any]], env: dict[str, str], inbox: bool) -> dict[str, bool]:
    """State in `deployments` what is paused at the server, so that it is resumed at no moment; return the names of those.

    What has a schedule and is new is paused while there is no inbox, and tagged so that a later deployment with one resumes it; the
    name of such a deployment has the value True.
    """
    wanted = {"deployments": {"name": {"any_": [deployment["name"] for deployment in deployments]}}}
    at_server = {(current["name"], current["entrypoint"]): current for current in ask_server(env, "/deployments/filter", wanted)}
    paused: dict[str, bool] = {}
    for deployment in deployments:
        current = at_server.get((deployment["name"], deployment["entrypoint"]), {})
        off = {schedule["slug"] for schedule in current.get("schedules", []) if not schedule["active"]}
        deployment["paused"] = bool(current.get("paused"))
        schedules = deployment.get("schedules", [])
        waits = not inbox and bool(schedules) and (not current or (WAITS in current["tags"] and bool(off)))
        if waits:
            deployment["tags"] = [*deployment["tags"], WAITS]
        elif WAITS in current.get("tags", []):
            off = set()
        for schedule in schedules:
            schedule["active"] = not waits and schedule["slug"] not in off
        if deployment["paused"] or not all(schedule["active"] for schedule in schedules):
            paused[deployment["name"]] = waits
    return paused


def ask_server(env: dict[str, str], path: str, body: dict[str, Any]) -> Any:
    """Ask the API; ValueError says in one sentence why there is no answer."""
    url = env["PREFECT_API_URL"]
    try:
        return post_json(env, path, body, timeout=30)
    except urllib.error.HTTPError as error:
        way = "state its USER:PASSWORD as PREFECT_API_AUTH_STRING" if error.code == 401 else "try again, and look at its log"
        raise ValueError(f"{url} answers {error.code} {error.reason}; {way}") from None
    except (OSError, ValueError):
        raise ValueError(f"no Prefect server answers at {url}; `cf up` starts this machine's") from None


def run_module(words: list[str], root: Path, env: dict[str, str], name: str) -> None:
    """Run `python -m WORDS`; ValueError with the last line that says something where it fails."""
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line.strip(" │╭╮╰╯─") for line in done.stdout.splitlines()]
        silent = f"it ended with {done.returncode} and said nothing"
        last = next((line for line in reversed(lines) if line and not line.startswith(EMPTY)), silent)
        raise ValueError(f"{name} failed: {last.removeprefix(f'{name}: ')[-1500:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
