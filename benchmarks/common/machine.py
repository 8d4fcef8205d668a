"""Facts that every result carries: the machine, its load, versions and the attention kernel; and the writing of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]
WIDER = ("avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile")  # as /proc/cpuinfo names them
ENVIRONMENT = {  # what `cf` itself sets for a stage
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
}


def describe_machine() -> dict[str, Any]:
    """Describe processor, versions, load and commit; what was measured is meant for this machine alone."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "ram_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30,
        "wider_than_avx2": [flag for flag in WIDER if flag in flags],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def read_result(name: str) -> dict[str, Any]:
    """Read results/NAME.json; {} where it was not made yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json; rows of numbers stay on one line."""
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(_dump(result) + "\n")
    partial.rename(path)
    return path


def _dump(value: Any, depth: int = 0) -> str:
    """Dump JSON with a line for each entry of the upper levels, so that a difference shows what has changed."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + depth <= 140 or not isinstance(value, dict | list) or not value:
        return flat
    pad = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_dump(entry, depth + 1)}" for key, entry in value.items()]
    else:
        parts = [_dump(entry, depth + 1) for entry in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + pad + f",{pad}".join(parts) + "\n" + " " * depth + right
