"""A machine for the tests: a real Prefect server and worker over a project of four stages, told what to do as a person would."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows.machine import processes, programs, settings
from flows.supervise import guardian
from tests.flows import project
from tests.week.machine import Receiver

ROOT = project.ROOT
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def until(true: Callable[[], Any], what: str, limit: float = 240) -> float:
    """Seconds that it took. Polls gently: these tests share two cores with what they watch. Limits that nobody was promised are wide."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit, f"not within {limit} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lay_out(folder: Path) -> Path:
    """The project of four stages with the flows and deployments of this tree, and a cron that is twelve hours away."""
    project.make(folder, seconds=0.5)
    for name in ("flows", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    hour = (time.gmtime().tm_hour + 12) % 24
    for file in (folder / "params.yaml", *(folder / "profiles").glob("*.yaml")):
        file.write_text(file.read_text() + f'nightly: {{cron: "30 {hour} * * *", timezone: UTC, inbox: inbox, absent_hours: 26.0}}\n')
    for name in (".gitignore", ".dvcignore"):
        with (folder / name).open("a") as file:
            file.write(".machine\n")
    project.git(folder, "add", "-A")
    project.git(folder, "commit", "-qm", "flows")
    return folder


class Machine:
    """`up` and `down` as commands; everything else over the server's own API."""

    def __init__(self, root: Path, **more: str) -> None:
        self.root, self.port, self.deployed = root, free_port(), 0.0
        self.url = f"http://127.0.0.1:{self.port}"
        # a GPU that is only a lock: stages are given it, and none of the test project's looks for more
        given = {"CF_GPUS": "1", "CF_GPU_LOCKS": str(root / ".machine/gpus"), "CF_PORT": str(self.port), "WANDB_MODE": "disabled"}
        self.told = Receiver()
        given["CF_ALERT_URL"] = self.told.url
        self.environment = project.environment(PYTHONPATH=str(root), **(given | more))

    def command(self, *words: str, code: int = 0, **more: str) -> str:
        env = self.environment | more
        done = subprocess.run([sys.executable, "-m", *words], cwd=self.root, env=env, capture_output=True, text=True, timeout=700)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def up(self) -> str:
        return self.command("flows.machine.up", "up")

    def down(self) -> str:
        return self.command("flows.machine.up", "down")

    def process(self, name: str) -> psutil.Process:
        """Of a program; waits for supervisor to start one that has just died."""
        own = settings.Machine(self.root, "127.0.0.1", self.port, 1)
        until(lambda: programs.find_process(own, name), f"the {name} runs", 30)
        found = programs.find_process(own, name)
        assert found, f"no {name}"
        return found

    def marked(self) -> list[psutil.Process]:
        return processes.find_marked(self.root)

    # ------------------------------------------------------------------------------------------------------- the API

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.url}/api{path}", data, {"content-type": "application/json"})
        for _ in range(40):
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    said = answer.read()
                    return json.loads(said) if said else None
            except urllib.error.HTTPError as error:
                if error.code != 503:  # which is SQLite being busy, and the UI tries again then too
                    raise
                time.sleep(0.5)
            except OSError:  # the server is being restarted
                time.sleep(0.5)
        raise AssertionError(f"no answer from {path}")

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.call("/deployments/filter", {}) if one["name"] == name]
        return dict(found)

    def start(self, deployment: str = "pipeline", **config: Any) -> str:
        wanted = {"parameters": {"config": config}}
        return str(self.call(f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", wanted)["id"])

    def start_night(self, **asked: Any) -> str:
        return str(self.call(f"/deployments/{self.deployment('nightly')['id']}/create_flow_run", {"parameters": asked})["id"])

    def run(self, run: str) -> dict[str, Any]:
        return dict(self.call(f"/flow_runs/{run}"))

    def state(self, run: str) -> str:
        return str(self.run(run)["state_name"])

    def tasks(self, run: str) -> dict[str, str]:
        """Stage -> state. A task that never began has its name and three characters more."""
        found = self.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {re.sub("-[0-9a-f]{3}$", "", one["name"]): one["state_name"] for one in found}

    def logs(self, run: str) -> list[str]:
        said: list[str] = []
        while True:
            wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200, "offset": len(said)}
            page = self.call("/logs/filter", wanted)
            said += [one["message"] for one in page]
            if len(page) < 200:
                return said

    def finish(self, run: str, limit: float = 300) -> str:
        until(lambda: self.run(run)["state_type"] in FINAL, f"run {run} ends", limit)
        return self.state(run)

    # --------------------------------------------------------------------------------------------------- what a run is

    def begun(self, run: str) -> list[psutil.Process]:
        """Waits until the run is in the middle: both stages at work, with the child that ignores everything."""
        until(lambda: {"child", "slow"} <= self.kinds(run), f"run {run} is in the middle")
        return self.stages(run)

    def worktree(self, run: str) -> Path:
        (found,) = (self.root / ".runs").glob(f"*-{run[:8]}")
        return found

    def kinds(self, run: str) -> set[str]:
        return {file.name.split("-")[0] for file in (self.root / ".runs").glob(f"*-{run[:8]}/trace/*")}

    def engine(self, run: str) -> psutil.Process:
        return processes.find_run_processes(self.root)[run][0]

    def stages(self, run: str) -> list[psutil.Process]:
        """All that is alive of the run's stages: DVC, the stages, their children, wherever they have gone."""
        name = self.worktree(run).name
        return [process for process, _ in guardian.find_marked() if of(process, name)]

    def gpu_is_held(self) -> bool:
        with (self.root / ".machine/gpus/gpu0.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def living(self, run: str) -> list[str]:
        names = [" ".join(words(process))[:80] for process in self.stages(run)]
        # the worker's hooks run with the run's name too, after it
        flow = [one for one in processes.find_run_processes(self.root).get(run, []) if "prefect.engine" in words(one)]
        return names + (["the flow"] if flow else [])


def words(process: psutil.Process) -> list[str]:
    """Its command line; none when it has just died."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def of(process: psutil.Process, run: str) -> bool:
    try:
        return process.environ().get("CF_RUN") == run
    except psutil.Error:
        return False


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "these tests drive a browser: apt-get install chromium"
    return os.path.realpath(found) if os.path.islink(found) else found
