"""Runs one stage: its working folder, its outs, its metrics, its runtime facts. Knows nothing of what a stage does.

Seconds, memory and machine differ between two runs that make the same bytes, so they go to runtime/<stage>.json, which DVC never sees.
"""

import fcntl
import hashlib
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

from tasks.files.atomic import delete_path, swap_into_place, write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import load_json_object
from tasks.params.project import Project
from tasks.params.yaml_file import Refused, value_at
from tasks.wandb_log import lineage
from tasks.wandb_log import run as mirror

from .process import resume_collection
from .track import Track, round_value

Run = Callable[..., Mapping[str, Any]]
METRICS, RUNTIME, WORK = Path("metrics"), Path("runtime"), Path("work")
USER_FILES = ("folder", "prompts_file", "ids")  # parameters that are paths of the user's own files


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
        track = Track(stage, work, resume=resume, mirror=mirror.start_run(stage, project, work), rules=params.watch)
        try:
            with write_beside(paths) as partial_paths, stop_on_sigterm(track):
                resume_collection()
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
        RUNTIME.mkdir(exist_ok=True)
        facts = measure_runtime(began, params.threads) | lineage.describe_origin(WORK) | track.facts
        write_atomically(RUNTIME / f"{stage}.json", json.dumps(facts, indent=2, sort_keys=True) + "\n")
        # and all stages into a script, because a page that is opened from disk can load no JSON
        stages = {file.stem: load_json_object(file) for file in sorted(RUNTIME.glob("*.json"))}
        write_atomically(RUNTIME / "runtime.js", f"window.CF_RUNTIME = {json.dumps(stages, indent=1, sort_keys=True)};\n")
        shutil.rmtree(work)


def compute_key(stage: str, paths: Mapping[str, Any], project: Project) -> str:
    """Hash everything that the stage's result depends on: command, contents of its dependencies, values of its parameters."""
    entry = project.stage(stage)
    deps = [Path(dep) for dep in entry.get("deps", [])]
    inputs = [value for name, value in paths.items() if name != "out" and isinstance(value, Path)]
    deps += [path for path in inputs if not any(path.is_relative_to(dep) or dep.is_relative_to(path) for dep in deps)]
    # A file that a parameter names is no dependency of DVC's. A killed run must still not continue with another file's results.
    section = project.tree.get(stage, {})
    deps += [Path(section[name]) for name in USER_FILES if isinstance(section, Mapping) and section.get(name)]
    parts = {
        "command": sorted(f"--{name} {value}" for name, value in paths.items()),
        "deps": {str(dep): compute_dvc_md5(dep) for dep in sorted(deps)},
        "params": dict(_select_params(entry.get("params", []), project.tree)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _select_params(entries: list[Any], tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Look up dvc.yaml's `params`: dotted keys, or {file: keys}, where no keys means the whole file."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry, value_at(tree, entry)
        else:
            for keys in entry.values():
                yield from _select_params(list(keys or tree), tree)


@contextmanager
def open_working_folder(stage: str, key: str) -> Iterator[tuple[Path, bool]]:
    """Lock work/<stage>/<key>, and yield it with whether an earlier process left files there. Refused if it is in use.

    The lock holds our process id. The kernel frees it when the process ends, also by kill -9.
    """
    work = WORK / stage / key
    lock = work / "lock"
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a+")
        except FileNotFoundError:  # a stage that has just succeeded removed the folder between the two lines
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise Refused(f"{work} is in use by process {owner}; wait for it to end, or end it, and start again") from None
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # the file that we locked was removed meanwhile, and another process may have made it anew
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield work, any(path != lock for path in work.iterdir())
            return


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
    out = paths["out"]
    new = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    delete_path(new)
    try:
        yield {**paths, "out": new}
    except BaseException:
        delete_path(new)
        raise
    if not new.exists():
        raise RuntimeError(f"the stage ended without writing {new}")
    swap_into_place(new, out)


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    torch = sys.modules.get("torch")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    return gpu | {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        "wall_seconds": round(time.time() - began, 2),
        "cpu_seconds": round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 2),
        "peak_mib": round(own.ru_maxrss / unit),
        "peak_mib_of_a_child": round(children.ru_maxrss / unit),
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()],
        "cpu": next(names, platform.processor() or "unknown"),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
