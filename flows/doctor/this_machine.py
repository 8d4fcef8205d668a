"""TODO: what flows.doctor.this_machine is for."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from flows.doctor.finding import Line
from flows.machine import processes
from flows.machine.settings import Machine, process_environment
from flows.project import overrides, run_lock, worktree
from flows.supervise import gpus

# outside these, something breaks that nothing else will tell you; pyproject.toml has the same (a test compares)
BREAKING_VERSIONS = {
    "fastapi>=0.139,<0.151": "from 0.155 on the server of Prefect 3.8 dies while it starts",
    "sqlalchemy>=2.0,<2.1": "with 2.1 the server's scheduler fails every minute, and no nightly ever runs",
    "prefect>=3.8.8,<3.9": "flows/ is tested with this one",
}


def check_versions(machine: Machine, fix: bool) -> Iterator[Line]:
    yield Line("python", "ok", ".".join(map(str, sys.version_info[:3])))  # an older one can't read these files
    for stated, why in BREAKING_VERSIONS.items():
        wanted = Requirement(stated)
        there = importlib.metadata.version(wanted.name)
        good = there in wanted.specifier
        what = f"{wanted.name} {there}" if good else f"{wanted.name} is {there}: {why}"
        yield Line("versions", "ok" if good else "fail", what, "" if good else f"pip install '{stated}'")
    pins = machine.root / "requirements/cpu.txt"
    found = re.findall(r"^([\w.-]+)==(\S+)$", pins.read_text(), re.M) if pins.exists() else []
    other = [f"{name} {has or 'missing'} for {pin}" for name, pin in found if (has := installed(name)) != pin]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        yield Line("pins", "warn", f"not as pinned: {', '.join(other[:5])}{more}", f"pip install -r {pins.relative_to(machine.root)}")
    elif found:
        yield Line("pins", "ok", f"{len(found)} packages as pinned")
    for program in ("git", "dvc"):
        if not shutil.which(program, path=process_environment(machine)["PATH"]):
            yield Line("programs", "fail", f"{program} isn't there", f"install {program}, or . .venv/bin/activate")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
    except importlib.metadata.PackageNotFoundError:
        return None


def check_port(machine: Machine, fix: bool) -> Iterator[Line]:
    server = processes.noted(machine.file("server.pid"))
    holder = processes.find_port_holder(machine.port)
    if server:
        yield Line("port", "ok", f"{machine.port} is this checkout's server's (process {server.pid})")
    elif holder:
        yield Line("port", "fail", f"{machine.port} is taken by {holder}", f"end it, or CF_PORT={machine.port + 1} make up")
    else:
        yield Line("port", "ok", f"{machine.port} is free")


def check_disk(machine: Machine, fix: bool) -> Iterator[Line]:
    """A full disk ends a stage after its work and before its record."""
    lock = machine.root / "dvc.lock"
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    outs = sum(out.get("size", 0) for stage in stages.values() for out in stage.get("outs", []))
    place = cache_folder(machine)
    kept = next(one for one in (place, *place.parents) if one.exists())  # DVC makes it when it needs it
    places = {folder.stat().st_dev: folder for folder in (kept, machine.root)}
    for folder in places.values():
        free, takes = shutil.disk_usage(folder).free, 2 * outs // len(places)  # what a run makes, and its copy in the cache
        need = max(takes, 2**30)
        level: Literal["ok", "warn", "fail"] = "fail" if free < need / 2 else "warn" if free < need else "ok"
        said = f"{free / 2**30:.1f} GiB free at {folder}; a whole run takes {takes / 2**30:.1f}"
        gc = "`dvc gc --all-branches --all-tags --all-experiments`"  # the tags are the promoted students
        todo = f"with nothing at work: commit what you need, `cf runs prune`, delete branches you don't need, {gc}"
        yield Line("disk", level, said, "" if level == "ok" else todo)


def cache_folder(machine: Machine) -> Path:
    """Of all worktrees, and maybe of other checkouts."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], cwd=machine.root, capture_output=True, text=True)
    return (machine.root / done.stdout.strip()).resolve()


def check_leftovers(machine: Machine, fix: bool) -> Iterator[Line]:
    """DVC writes <md5>.tmp files and renames them; a killed run or a full disk leaves them for ever."""
    hour_ago = time.time() - 3600
    stale = [file for file in (cache_folder(machine) / "files/md5").rglob("*.tmp") if file.is_file() and file.stat().st_mtime < hour_ago]
    if not stale:
        yield Line("cache", "ok", "no leftovers of interrupted copies")
        return
    size = sum(file.stat().st_size for file in stale) / 2**20
    if fix:
        for file in stale:
            file.unlink(missing_ok=True)
        yield Line("cache", "ok", f"removed {len(stale)} leftovers of interrupted copies ({size:.0f} MiB)")
    else:
        yield Line("cache", "warn", f"{len(stale)} leftovers of interrupted copies ({size:.0f} MiB)", "`cf doctor --fix` removes them")


def check_locks(machine: Machine, fix: bool) -> Iterator[Line]:
    """DVC's read and write locks name their holders. The next dvc takes a dead one's away by itself."""
    said: list[str] = []
    for folder in [machine.root, *worktree.found(machine.root)]:
        file = folder / ".dvc/tmp/rwlock"
        text = file.read_text() if file.exists() else ""
        held = {int(pid) for pid in re.findall(r'"pid": (\d+)', text)}
        dead = {pid for pid in held if not psutil.pid_exists(pid)}
        if dead and fix and held == dead:
            file.write_text("{}")
        elif dead:
            said.append(f"{file} names processes that are dead ({', '.join(map(str, sorted(dead)))})")
    if said:
        yield Line("locks", "warn", "; ".join(said), "the next `dvc repro` there takes them away, `cf doctor --fix` does it now")
    else:
        yield Line("locks", "ok", "no stale lock of DVC")


def check_worktrees(machine: Machine, fix: bool) -> Iterator[Line]:
    runs = worktree.found(machine.root)
    idle = [run for run in runs if not run_lock.in_use(run)]
    many = len(idle) > 2 * worktree.KEEP
    said = f"{len(runs)} worktrees of runs, {len(runs) - len(idle)} at work"
    yield Line("runs", "warn" if many else "ok", said, "`cf runs prune` removes old ones; branches stay" if many else "")


def check_gpus(machine: Machine, fix: bool) -> Iterator[Line]:
    there = gpus.available()
    if not there:
        yield Line("GPU", "ok", "none; every stage runs on the CPU")
        return
    words = [sys.executable, "-c", "import torch; print(torch.cuda.device_count(), torch.__version__)"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    count, version = [*done.stdout.split(), "0", "unknown"][:2]
    if int(count) < len(there):
        said = f"{len(there)} there, and torch {version} can use {count}"
        yield Line("GPU", "fail", said, "install a CUDA build of torch that fits the driver (nvidia-smi shows which)")
    for number, holder in gpus.holders().items():
        said = "free" if holder is None else f"held by process {holder}"
        stale = holder is not None and not psutil.pid_exists(holder)
        todo = f"a child of it lives: `fuser -v {gpus.folder()}/gpu{number}.lock` shows which" if stale else ""
        yield Line("GPU", "warn" if stale else "ok", f"{number} is {said}", todo)


def check_extensions(machine: Machine, fix: bool) -> Iterator[Line]:
    """torch builds DeepSpeed's operators under a file `lock`; who waits for one that a killed build left waits for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    builds = {"ninja", "nvcc", "cc1plus", "ptxas"}
    at_work = any(process.info["name"] in builds for process in psutil.process_iter(["name"]))
    for file in [] if at_work else folder.glob("**/lock"):
        if fix:
            file.unlink(missing_ok=True)
            yield Line("extensions", "ok", f"{file} removed")
        else:
            yield Line("extensions", "warn", f"{file} is there, and nothing is being built", f"rm {file}")


def check_remote(machine: Machine, fix: bool) -> Iterator[Line]:
    try:
        importlib.import_module("flows.project.dvc_remote").check(machine.root)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        # Misconfigured is somebody's mistake; one machine can do without a remote; one that is away may be back in an hour
        said = " ".join(str(error).split())
        mistake = type(error).__name__ == "Misconfigured" and "has no DVC remote" not in said
        yield Line("remote", "fail" if mistake else "warn", said, "" if "`" in said else "`cf remote check` tries it again")
        return
    yield Line("remote", "ok", "there, and what comes from it is verified")


def check_wandb(machine: Machine, fix: bool) -> Iterator[Line]:
    stated = overrides.read((machine.root / "params.yaml").read_text()).get("tracking", {}).get("wandb", "disabled")
    mode = os.environ.get("WANDB_MODE") or stated
    waiting = [run for run in machine.root.glob("runtime/wandb/offline-run-*") if not list(run.glob("*.synced"))]
    if mode == "online" and "WANDB_API_KEY" not in os.environ and not (Path.home() / ".netrc").exists():
        yield Line("W&B", "fail", "online, and no key is known", "state WANDB_API_KEY in the environment, or WANDB_MODE=offline")
    elif waiting:
        yield Line("W&B", "ok", f"{mode}; {len(waiting)} offline runs are kept here", "`cf wandb sync` sends them" * (mode == "online"))
    else:
        yield Line("W&B", "ok", mode)
