"""Runs one stage: its working folder, its outs, its metrics, its runtime facts. Knows nothing of what a stage does.

Seconds, memory and machine differ between two runs that make the same bytes, so they go to runtime/<stage>.json, which DVC never sees.
"""

from __future__ import annotations

import json
import os
import platform
import random
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

from tasks.files.atomic import write_atomically
from tasks.params.project import Project
from tasks.wandb_log import run as mirror

from .track import Track, round_value
from .working_folder import compute_key, open_working_folder

Run = Callable[..., Mapping[str, Any]]
METRICS, RUNTIME = Path("metrics"), Path("runtime")


def execute(
    stage: str, run: Run, paths: Mapping[str, Any], project: Project, *, began: float, announce: Callable[[Path], object] | None = None
) -> None:
    """Run a stage from start to end.

    The stage writes to `<out>.partial`, which takes the place of `out` after a success. A second start after a kill finds
    the checkpoints of the first in the working folder; a success removes that folder. `announce` is called with the
    working folder once this process holds it.
    """
    params = project.params
    seed_generators(params)
    with open_working_folder(stage, compute_key(stage, paths, project)) as (work, resume):
        if announce:
            announce(work)
        track = Track(stage, work, resume=resume, mirror=mirror.start_run(stage, project, work))
        try:
            with write_beside(paths) as partial_paths, stop_on_sigterm(track):
                metrics = round_metrics(stage, run(params, track, **partial_paths))
        except BaseException as error:
            track.close(exit_code=143 if isinstance(error, SystemExit) else 1)
            if isinstance(error, Exception):
                from cf_model.model.checkpoint import explain_full_disk  # here, because it imports torch

                if message := explain_full_disk(error):
                    remedy = f"its checkpoints in {work} are intact: make room and start again"
                    raise ValueError(f"there is no room for what {stage} makes ({message}); {remedy}") from None
            raise
        if metrics:
            METRICS.mkdir(exist_ok=True)
            write_atomically(METRICS / f"{stage}.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        track.close(metrics)
        track.save_times(RUNTIME)
        write_runtime(stage, measure_runtime(began, params.threads) | track.facts)
        shutil.rmtree(work)


def seed_generators(params: Any) -> None:
    """Seed the global generators for libraries that draw from them; stages draw from generators of their own."""
    random.seed(params.seed)
    np.random.seed(params.seed)
    if "torch" not in sys.modules:
        return
    import torch

    torch.manual_seed(params.seed)
    torch.set_num_threads(params.threads)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def write_beside(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the paths with `<out>.partial` for `out`; on success move it into place, on failure leave the old `out` as it was."""
    out = paths.get("out")
    if out is None:
        yield dict(paths)
        return
    new, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    out.parent.mkdir(parents=True, exist_ok=True)
    _delete_path(new)
    try:
        yield {**paths, "out": new}
    except BaseException:
        _delete_path(new)
        raise
    if not new.exists():
        raise RuntimeError(f"the stage ended without writing {new}")
    _delete_path(old)
    if out.exists():
        out.rename(old)
    new.rename(out)
    _delete_path(old)


def _delete_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def round_metrics(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Round all numbers of a nested mapping to six digits; raise ValueError for a metric that is not finite."""
    rounded: dict[str, Any] = {}
    for name, value in metrics.items():
        rounded[name] = round_metrics(f"{stage}.{name}", value) if isinstance(value, Mapping) else round_value(value)
        if rounded[name] is None:
            raise ValueError(f"the metric {stage}.{name} is {value}; leave out what was not measured")
    return rounded


@contextmanager
def stop_on_sigterm(track: Track) -> Iterator[None]:
    """End the stage on SIGTERM as an exception does: W&B is finished, the lock freed, the checkpoints stay.

    A training loop first finishes its step and saves. A second SIGTERM does not wait for that, unless it comes within two
    seconds: flows/supervise asks a launcher and its ranks at once, and the launcher asks its ranks again.
    """
    requested_at = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal requested_at
        if track.stop_requested is None or (track.stop_requested and time.monotonic() - requested_at > 2):
            raise SystemExit(143)
        track.stop_requested, requested_at = True, requested_at or time.monotonic()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure_runtime(began: float, threads: int) -> dict[str, Any]:
    """Measure this process since `began`, with the children that it has waited for."""
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
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def write_runtime(stage: str, values: Mapping[str, Any]) -> None:
    """Write runtime/<stage>.json, and all stages into a script, because a page that is opened from disk can load no JSON."""
    RUNTIME.mkdir(exist_ok=True)
    write_atomically(RUNTIME / f"{stage}.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    stages = {file.stem: json.loads(file.read_text()) for file in sorted(RUNTIME.glob("*.json"))}
    write_atomically(RUNTIME / "runtime.js", f"window.CF_RUNTIME = {json.dumps(stages, indent=1, sort_keys=True)};\n")
