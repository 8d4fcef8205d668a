"""What `cf doctor` checks without asking a server: packages, port, disk, caches, locks, GPUs, remote and tracker."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows.doctor.finding import Finding, Level
from flows.machine import processes, programs
from flows.machine.settings import Machine, process_environment
from flows.project import dvc_lock, run_lock, worktree
from flows.project.dvc_command import run_dvc
from flows.supervise import gpus
from tasks.files.dvc_rwlock import mend_rwlock
from tasks.files.settings import read_settings
from tasks.files.words import count_things
from tasks.params import yaml_file


def check_versions(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check with `pip check` that installed packages fit each other and the ranges of pyproject.toml.

    Outside these ranges something breaks without a word: the server dies at its start, or its scheduler makes no runs.
    """
    yield Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))  # an older one can't read these files
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=300)
    conflicts = [line for line in done.stdout.splitlines() if " requires " in line or " has requirement " in line]
    for line in conflicts:
        level: Level = "fail" if line.startswith("context-forcing ") else "warn"
        yield Finding("versions", level, line.rstrip("."), "pip install -r requirements/cpu.txt, which says why")
    if not conflicts and done.returncode:
        raise ValueError(done.stderr)
    if not conflicts:
        yield Finding("versions", "ok", "the installed packages fit together")
    for program in ("git", "dvc"):
        if not shutil.which(program, path=process_environment(machine)["PATH"]):
            yield Finding("programs", "fail", f"{program} isn't there", f"install {program}, or . .venv/bin/activate")


def check_environment(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Find CF_* variables that mean nothing, such as misspelt ones. Malformed ones are refused before any check."""
    unknown = read_settings().find_unknown()
    for sentence in unknown:
        yield Finding("environment", "warn", sentence, "`cf env` lists what there is")
    if not unknown:
        yield Finding("environment", "ok", "every CF_* variable is known")


def check_port(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check that the server's port is free or this checkout's."""
    server, holder = programs.find_process(machine, "server"), processes.find_port_holder(machine.port)
    if server:
        yield Finding("port", "ok", f"{machine.port} is this checkout's server's (process {server.pid})")
    elif holder:
        yield Finding("port", "fail", f"{machine.port} is taken by {holder}", f"end it, or CF_PORT={machine.port + 1} make up")
    else:
        yield Finding("port", "ok", f"{machine.port} is free")


def check_disk(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Compare free space with what a whole run takes, because a full disk ends a stage after its work and before its record."""
    outs = sum(out.get("size", 0) for made in dvc_lock.read_lock(machine.root).values() for out in made)
    cache = cache_folder(machine)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())  # DVC makes the cache when it needs it
    disks = {folder.stat().st_dev: folder for folder in (existing, machine.root)}
    for folder in disks.values():
        free, size = shutil.disk_usage(folder).free, 2 * outs // len(disks)  # what a run makes, and its copy in the cache
        need = max(size, 2**30)
        level: Level = "fail" if free < need / 2 else "warn" if free < need else "ok"
        text = f"{free / 2**30:.1f} GiB free at {folder}; a whole run takes {size / 2**30:.1f}"
        todo = "with nothing at work: commit what you need, `cf runs prune`, delete branches you don't need, `cf gc --delete`"
        yield Finding("disk", level, text, "" if level == "ok" else todo)


def cache_folder(machine: Machine) -> Path:
    """Ask DVC for its cache, which all worktrees and perhaps other checkouts share."""
    return (machine.root / run_dvc(machine.root, "cache", "dir").strip()).resolve()


def check_leftovers(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Find <md5>.tmp files in the cache: DVC renames them when they are complete, and a killed run or a full disk leaves them."""
    hour_ago = time.time() - 3600
    stale = [file for file in (cache_folder(machine) / "files/md5").rglob("*.tmp") if file.is_file() and file.stat().st_mtime < hour_ago]
    text = f"{count_things(len(stale), 'leftover')} of interrupted copies ({sum(file.stat().st_size for file in stale) / 2**20:.0f} MiB)"
    if not stale:
        yield Finding("cache", "ok", "no leftovers of interrupted copies")
    elif not fix:
        yield Finding("cache", "warn", text, "`cf doctor --fix` removes them")
    else:
        for file in stale:
            file.unlink(missing_ok=True)
        yield Finding("cache", "ok", f"removed {text}")


def check_locks(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Find locks of DVC whose holders are dead, which the next dvc removes by itself, and records of locks that no dvc can read."""
    stale: list[str] = []
    torn: list[str] = []
    for folder in [machine.root, *worktree.list_worktrees(machine.root)]:
        sentence, file = mend_rwlock(folder, only_look=not fix), folder / ".dvc/tmp/rwlock"
        text = file.read_text(errors="replace") if file.exists() else ""
        holders = {int(pid) for pid in re.findall(r'"pid": (\d+)', text)}
        dead = {pid for pid in holders if not psutil.pid_exists(pid)}
        if sentence and file.exists():
            torn.append(sentence)
        elif dead and fix and holders == dead:
            file.write_text("{}")
        elif dead:
            stale.append(f"{file} names processes that are dead ({', '.join(map(str, sorted(dead)))})")
    if torn:
        yield Finding("locks", "fail", "; ".join(torn), "`cf doctor --fix` removes it; until then every dvc fails there")
    todo = "the next `dvc repro` there takes them away, `cf doctor --fix` does it now" if stale else ""
    if stale or not torn:
        yield Finding("locks", "warn" if stale else "ok", "; ".join(stale) or "no stale lock of DVC", todo)


def check_worktrees(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Count the runs' worktrees that could be removed."""
    runs = worktree.list_worktrees(machine.root)
    idle = [run for run in runs if not run_lock.is_in_use(run)]
    many = len(idle) > 2 * worktree.KEEP
    text = f"{count_things(len(runs), 'worktree')} of runs, {len(runs) - len(idle)} at work"
    yield Finding("runs", "warn" if many else "ok", text, "`cf runs prune` removes old ones; branches stay" if many else "")


def check_gpus(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check that torch can use all GPUs, and that the holder of each GPU's lock lives."""
    numbers = gpus.list_gpus()
    if not numbers:
        yield Finding("GPU", "ok", "none; every stage runs on the CPU")
        return
    words = [sys.executable, "-c", "import torch; print(torch.cuda.device_count(), torch.__version__)"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    count, version = [*done.stdout.split(), "0", "unknown"][:2]
    if int(count) < len(numbers):
        text = f"{count_things(len(numbers), 'GPU')} here, and torch {version} can use {count}"
        yield Finding("GPU", "fail", text, "install a CUDA build of torch that fits the driver (nvidia-smi shows which)")
    for number, holder in gpus.find_holders().items():
        state = "free" if holder is None else f"held by process {holder}"
        stale = holder is not None and not psutil.pid_exists(holder)
        todo = f"a child of it lives: `fuser -v {gpus.lock_folder()}/gpu{number}.lock` shows which" if stale else ""
        yield Finding("GPU", "warn" if stale else "ok", f"{number} is {state}", todo)


def check_extensions(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Find locks that killed builds of DeepSpeed's operators have left, because the next build waits for them for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    builds = {"ninja", "nvcc", "cc1plus", "ptxas"}
    at_work = any(process.info["name"] in builds for process in psutil.process_iter(["name"]))
    for file in [] if at_work else folder.glob("**/lock"):
        if fix:
            file.unlink(missing_ok=True)
            yield Finding("extensions", "ok", f"{file} removed")
        else:
            yield Finding("extensions", "warn", f"{file} is there, and nothing is being built", f"rm {file}")


def check_remote(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check the DVC remote as `cf remote check` does. A mistake in its settings fails; none, or one that is away, is a warning."""
    from flows.project import dvc_remote  # imports Prefect, which must not happen before the environment says where its server is

    try:
        dvc_remote.check_remote(machine.root)
        yield Finding("remote", "ok", "reached, and what comes from it is verified")
    except (dvc_remote.RemoteAway, dvc_remote.RemoteMisconfigured) as error:
        text = " ".join(str(error).split())
        mistake = isinstance(error, dvc_remote.RemoteMisconfigured) and "has no DVC remote" not in text
        yield Finding("remote", "fail" if mistake else "warn", text, "" if "`" in text else "`cf remote check` tries it again")


def check_wandb(machine: Machine, fix: bool) -> Iterator[Finding]:
    """Check that W&B has a key where it is online, and count the runs that wait to be sent."""
    mode = os.environ.get("WANDB_MODE") or yaml_file.read_yaml(machine.root / "params.yaml").get("tracking", {}).get("wandb", "disabled")
    waiting = [run for run in machine.root.glob("runtime/wandb/offline-run-*") if not list(run.glob("*.synced"))]
    if mode == "online" and "WANDB_API_KEY" not in os.environ and not (Path.home() / ".netrc").exists():
        yield Finding("W&B", "fail", "online, and no key is known", "state WANDB_API_KEY in the environment, or WANDB_MODE=offline")
    else:
        todo = "`cf wandb sync` sends them" if waiting and mode == "online" else ""
        yield Finding("W&B", "ok", f"{mode}; {count_things(len(waiting), 'offline run')} kept here" if waiting else mode, todo)
