"""runtime/<stage>.json: seconds, memory and machine of a stage, which differ between two runs that make the same bytes."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.files.atomic import write_atomically

RUNTIME = Path("runtime")


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
