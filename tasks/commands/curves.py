"""`cf curves`: what a training stage says of itself, as lines of text, while it runs and afterwards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.params.yaml_file import Refused

WIDTH = 40
RAMPS = ("▁▂▃▄▅▆▇█", "_.-=+*%#")  # lowest to highest; the second for terminals that know no other letters


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf curves", description="The curves of a training stage, in the terminal.", epilog=(
        "Each line: where the value went, in means of as many steps as a letter stands for; its lowest and highest mean; its last mean. "
        "What they should look like: docs/training.md."
    ))  # fmt: skip
    parser.add_argument("stage", help="base, teacher, causal_init, stage1 or stage2")
    parser.add_argument("name", nargs="*", help="values, or how their names begin; all of them when none is named")
    parser.add_argument("--seconds", action="store_true", help="what the steps took, and the memory they were done in, instead")
    args = parser.parse_args(argv)
    file = newest(args.stage, args.seconds)
    rows = read(file)
    if not rows:
        raise Refused(f"{file} holds no step yet; wait for the first")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]
    chosen = [name for name in names if not args.name or any(name.startswith(start) for start in args.name)]
    if not chosen:
        raise Refused(f"{file} holds no value that begins with {' or '.join(args.name)}; it has {', '.join(names)}")
    print(f"{file}: steps {rows[0]['step']} to {rows[-1]['step']}")
    ramp = RAMPS[0] if "utf" in (sys.stdout.encoding or "").lower() else RAMPS[1]
    width = max(map(len, chosen))
    for name in chosen:
        means = spread([row.get(name) for row in rows], WIDTH)
        there = [mean for mean in means if mean is not None]
        if there:
            print(f"{name:<{width}} {line(means, ramp)} {min(there):.4g} .. {max(there):.4g}, last {there[-1]:.4g}")


def newest(stage: str, seconds: bool) -> Path:
    """Of the run that goes on, or was killed, if there is one; else of the one that was finished."""
    name, done = "metrics.jsonl", Path(f"models/{stage}/metrics.jsonl")
    if seconds:
        name, done = "timing.jsonl", Path(f"runtime/{stage}.timing.jsonl")
    running = sorted(Path("work").glob(f"{stage}/*/{name}"), key=lambda path: path.stat().st_mtime)
    for file in [*running[::-1], done]:
        if file.exists():
            return file
    raise Refused(f"there is neither work/{stage}/*/{name} nor {done}; name a training stage that was started here")


def read(file: Path) -> list[dict[str, Any]]:
    """Without a last row that is still being written."""
    return [json.loads(text) for text in file.read_text().splitlines(keepends=True) if text.endswith("\n")]


def spread(values: Sequence[float | None], width: int) -> list[float | None]:
    """Means of neighbouring values, `width` of them; None where none of the neighbours was measured."""
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    held = [[value for value in part if value is not None] for part in parts]
    return [sum(part) / len(part) if part else None for part in held]


def line(means: Sequence[float | None], ramp: str) -> str:
    """A letter each, by height between the lowest and the highest; a space where there is none."""
    there = [mean for mean in means if mean is not None]
    low, size = min(there), max(there) - min(there)
    steps = [None if mean is None else round((mean - low) / size * (len(ramp) - 1)) if size else 0 for mean in means]
    return "".join(" " if step is None else ramp[step] for step in steps)
