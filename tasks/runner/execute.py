"""Runs one stage: its working folder, its outs, its metrics, its runtime facts. Knows nothing of what a stage does."""

from __future__ import annotations

import errno
import json
import os
import random
import re
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

from .runtime import RUNTIME, measure_runtime, write_runtime
from .track import Track, round_value
from .working_folder import compute_key, open_working_folder

Run = Callable[..., Mapping[str, Any]]
METRICS = Path("metrics")


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
            if message := disk_full_message(error):
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


def disk_full_message(error: BaseException) -> str | None:
    """Return the system's message if the error means a full disk. safetensors raises it as text without an error number."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":
        number = int((re.findall(r"os error (\d+)", str(error)) or [0])[-1])
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


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
