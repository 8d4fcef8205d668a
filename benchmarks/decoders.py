"""decord 0.6, read without jumps, against this project's reader: CPU time, right frames, and damage that is noticed.

  pip install decord==0.6.0; python -m benchmarks decoders CLIPS [--rounds 5]     writes results/decoders.json

CLIPS is a folder of real videos. The films whose frames are counted are written here: every container and codec of tests/data/files.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.common.decoders import Seen, read_by_decord, read_by_pyav
from benchmarks.common.machine import describe_machine, write_result
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tasks.files.videos import VIDEO_SUFFIXES
from tests.data.files import KINDS, PAIRS, decode_in_order, write_film
from tests.data.test_fuzz import flip_bytes

READERS: dict[str, Callable[[Path], Seen]] = {"decord": read_by_decord, "pyav": read_by_pyav}
RATES = (Fraction(24000, 1001), Fraction(25), Fraction(60))
BEGINNINGS = (0, 30)  # frames before a film's first one
FRAMES, TOLERANCE = 48, 3.0  # neighbouring frames differ by 9 grey levels at least
COPIES = 20  # damaged ones of each small file
SMALL = 100_000  # bytes


def read_all(reader: str, paths: Sequence[Path]) -> list[Seen | Unreadable]:
    """Read every file in a child process, one after the other."""
    found = dict(read_in_subprocess(READERS[reader], paths, workers=1, timeout=60.0))
    return [found[i] for i in range(len(paths))]


def time_files(paths: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Return each file's CPU time by either reader, the median over rounds in which the readers take turns."""
    spent: dict[str, list[list[Seen | Unreadable]]] = {name: [] for name in READERS}
    for number in range(rounds):
        for name in list(READERS) if number % 2 == 0 else reversed(list(READERS)):
            spent[name].append(read_all(name, paths))
    rows = []
    for i, path in enumerate(paths):
        row: dict[str, Any] = {"file": path.name}
        for name, found in spent.items():
            times = [answer[1] for answer in (one[i] for one in found) if not isinstance(answer, Unreadable)]
            row[name] = round(1000 * statistics.median(times), 1) if times else None
        rows.append(row | {"ratio": round(row["decord"] / row["pyav"], 2) if row["decord"] and row["pyav"] else None})
    return rows


def count_right_films(folder: Path) -> list[dict[str, Any]]:
    """Return how many films of each container and codec either reader sees as PyAV's sequential decoding does."""
    rows = []
    for container, codec in PAIRS:
        paths, truths = [], []
        for rate in RATES:
            for begin in BEGINNINGS if container != "avi" else (0,):
                path = folder / f"{len(paths)}-{codec}.{KINDS[container][0]}"
                write_film(path, container, codec, rate, range(begin, begin + FRAMES))
                paths.append(path)
                truths.append(decode_in_order(path)[1])
        row: dict[str, Any] = {"container": container, "codec": codec, "films": len(paths)}
        for name in READERS:
            row[name] = sum(is_right(found, truth) for found, truth in zip(read_all(name, paths), truths, strict=True))
        rows.append(row)
    return rows


def is_right(found: Seen | Unreadable, truth: list[float]) -> bool:
    """Say whether all frames are there, in their order."""
    if isinstance(found, Unreadable) or len(found[0]) != len(truth):
        return False
    return bool(np.abs(np.subtract(found[0], truth)).max() < TOLERANCE)


def count_noticed_damage(paths: Sequence[Path], folder: Path) -> dict[str, int]:
    """Return of how many copies with changed bytes either reader says that they are damaged."""
    rng, copies = np.random.default_rng(0), []
    for path in paths:
        for number in range(COPIES):
            copies.append(folder / f"{number}-{path.name}")
            copies[-1].write_bytes(flip_bytes(path.read_bytes(), rng))
    return {"copies": len(copies)} | {name: sum(isinstance(one, Unreadable) for one in read_all(name, copies)) for name in READERS}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks decoders", description=__doc__, formatter_class=form)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if importlib.util.find_spec("decord") is None:
        sys.exit("decord is not installed; pip install decord==0.6.0")
    files = sorted(file for file in args.clips.iterdir() if file.suffix in VIDEO_SUFFIXES)
    result: dict[str, Any] = {"machine": describe_machine(), "decord": "0.6.0", "unit": "milliseconds of CPU time, a median, one thread"}
    result["real_files"] = time_files(files, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        result["right_films"] = count_right_films(Path(folder))
        result["noticed_damage"] = count_noticed_damage([file for file in files if file.stat().st_size < SMALL], Path(folder))
    ratios = [row["ratio"] for row in result["real_files"] if row["ratio"]]
    result["ratio"] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)], "files": len(ratios)}
    for row in (*result["real_files"], *result["right_films"], result["noticed_damage"], result["ratio"]):
        print(row)
    write_result("decoders", result)


if __name__ == "__main__":
    main()
