"""Runs one stage: its working folder, its outs, its metrics, its runtime facts. Knows nothing of what a stage does."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.files.hashes import digest
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused
from tasks.wandb_log import run as mirror

from . import track as tracking

Run = Callable[..., Mapping[str, Any]]
Announce = Callable[[Path], object]  # of the working folder, once it is ours
METRICS, RUNTIME, WORK = Path("metrics"), Path("runtime"), Path("work")
NAMED = ("folder", "prompts_file")  # parameters that are paths of the user's own files


def execute(
    stage: str, run: Run, paths: Mapping[str, Any], params: Any, stated: Mapping[str, Any], *, began: float, announce: Announce = id
) -> None:
    """One stage from start to end. `stated` is params.yaml as read, `params` the same as types.

    The stage writes to `<out>.partial`, which takes the place of `out` when all went well. A second start after a kill
    finds the first one's checkpoints in its working folder; a stage that succeeds leaves none.
    """
    seed(params)
    with working_folder(stage, key(stage, paths, stated)) as (work, resume):
        announce(work)
        track = tracking.Track(stage, work, resume=resume, mirror=mirror.begin(stage, params.tracking, stated, work))
        try:
            with partial(paths) as given, terminated_cleanly(track):
                metrics = rounded(stage, run(params, track, **given))
        except BaseException as error:
            track.close(exit_code=143 if isinstance(error, SystemExit) else 1)
            if said := full_disk(error):
                kept = f"its checkpoints in {work} are intact: make room and start again"
                raise ValueError(f"there is no room for what {stage} makes ({said}); {kept}") from None
            raise
        if metrics:
            METRICS.mkdir(exist_ok=True)
            tracking.replace(METRICS / f"{stage}.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        track.close(metrics)
        track.keep_times(RUNTIME)
        write_runtime(stage, facts(began, params.threads) | track.facts)
        shutil.rmtree(work)


def full_disk(error: BaseException) -> str | None:
    """The system's words for it. safetensors passes them on without a number of its own."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":
        number = int((re.findall(r"os error (\d+)", str(error)) or [0])[-1])
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def seed(params: Any) -> None:
    """The global generators, for whatever draws from them; stages draw from their own. torch only where the stage needs it."""
    random.seed(params.seed)
    np.random.seed(params.seed)
    if "torch" not in sys.modules:
        return
    import torch

    torch.manual_seed(params.seed)
    torch.set_num_threads(params.threads)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)


# ------------------------------------------------------------------------------------------------- working folder


def key(stage: str, paths: Mapping[str, Any], stated: Mapping[str, Any], pipeline: Path = Path("dvc.yaml")) -> str:
    """Names everything that this stage's result depends on: command, contents of its dependencies, values of its parameters."""
    entry = yaml_file.pipeline(pipeline, stated).get(stage, {}) if pipeline.exists() else {}
    deps = [Path(dep) for dep in entry.get("deps", [])]
    given = [Path(value) for name, value in paths.items() if name != "out" and isinstance(value, Path)]
    deps += [path for path in given if not any(_covers(path, dep) for dep in deps)]
    # what a parameter names is no DVC dependency; a killed run must still not go on with another file's results
    section = stated.get(stage, {})
    deps += [Path(section[name]) for name in NAMED if isinstance(section, Mapping) and section.get(name)]
    parts = {
        "command": sorted(f"--{name} {value}" for name, value in paths.items()),
        "deps": {str(dep): digest(dep) for dep in sorted(deps)},
        "params": {name: value for name, value in _values(entry.get("params", []), stated)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _covers(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _values(names: list[Any], stated: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """dvc.yaml's `params`: dotted keys, or {file: keys}, where no keys means all of the file."""
    for name in names:
        if isinstance(name, str):
            yield name, yaml_file.at(stated, name)
            continue
        for keys in name.values():
            yield from _values(list(keys or stated), stated)


@contextmanager
def working_folder(stage: str, name: str) -> Iterator[tuple[Path, bool]]:
    """work/<stage>/<key>, ours alone while the process lives: the kernel frees the lock, also after kill -9."""
    work = WORK / stage / name
    with _locked(work / "lock"):
        yield work, any(path.name != "lock" for path in work.iterdir())


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a+")
        except FileNotFoundError:  # removed between the two lines by a stage that has just succeeded
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise Refused(f"{lock.parent} is in use by process {owner}; wait for it to end, or end it, and start again") from None
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            return


# ----------------------------------------------------------------------------------------------------------- outs


@contextmanager
def partial(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same paths with `out` beside its place; on success it moves there, and until then what was there stays."""
    out = paths.get("out")
    if out is None:
        yield dict(paths)
        return
    new, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(new)
    try:
        yield {**paths, "out": new}
    except BaseException:
        _remove(new)
        raise
    if not new.exists():
        raise RuntimeError(f"the stage ended without writing {new}")
    _remove(old)
    if out.exists():
        out.rename(old)
    new.rename(out)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rounded(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, in folders of numbers as deep as the stage likes. One that is not finite is a bug worth stopping for."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found[name] = rounded(f"{stage}.{name}", value) if isinstance(value, Mapping) else tracking.rounded(value)
        if found[name] is None:
            raise ValueError(f"the metric {stage}.{name} is {value}; leave out what was not measured")
    return found


@contextmanager
def terminated_cleanly(track: tracking.Track) -> Iterator[None]:
    """SIGTERM ends the stage as an exception does: W&B is finished, the lock freed, the checkpoints stay. A training loop
    first finishes its step and saves; a second SIGTERM does not wait for it."""

    def stop(number: int, frame: object) -> None:
        if track.asked is not False:
            raise SystemExit(143)
        track.asked = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------- runtime facts


def facts(began: float, threads: int) -> dict[str, Any]:
    """What differs between two runs that make the same bytes."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss in a MiB
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        "wall_seconds": round(time.time() - began, 2),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 2),
        "peak_mib": round(own.ru_maxrss / unit),
        "peak_mib_of_a_child": round(children.ru_maxrss / unit),
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def write_runtime(stage: str, values: Mapping[str, Any]) -> None:
    """runtime/<stage>.json, and all stages in one script that a page opened from disk can load."""
    RUNTIME.mkdir(exist_ok=True)
    tracking.replace(RUNTIME / f"{stage}.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    stages = {file.stem: json.loads(file.read_text()) for file in sorted(RUNTIME.glob("*.json"))}
    tracking.replace(RUNTIME / "runtime.js", f"window.CF_RUNTIME = {json.dumps(stages, indent=1, sort_keys=True)};\n")
