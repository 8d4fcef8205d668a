"""`cf curves`: the values that a training stage logs, as lines of text, while it runs and afterwards."""

import sys
from pathlib import Path

from cf_model.evaluate.text_curves import average_neighbours, draw_line
from tasks.files.json_lines import read_json_lines
from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused

WIDTH = 40
RAMPS = ("▁▂▃▄▅▆▇█", "_.-=+*%#")  # lowest to highest; the second for terminals without Unicode


def main(argv: list[str]) -> None:
    args = parse_options("curves", argv)
    file = find_newest_rows(args.stage, args.seconds)
    rows = read_json_lines(file, growing=True)
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
        means = average_neighbours([row.get(name) for row in rows], WIDTH)
        if measured := [mean for mean in means if mean is not None]:
            print(f"{name:<{width}} {draw_line(means, ramp)} {min(measured):.4g} .. {max(measured):.4g}, last {measured[-1]:.4g}")


def find_newest_rows(stage: str, seconds: bool) -> Path:
    """Return the file of rows of the newest run in work/, which goes on or was killed; without one, that of the finished run."""
    name, finished = "metrics.jsonl", Path(f"models/{stage}/metrics.jsonl")
    if seconds:
        name, finished = "timing.jsonl", Path(f"runtime/{stage}.timing.jsonl")
    running = sorted(Path("work").glob(f"{stage}/*/{name}"), key=lambda path: path.stat().st_mtime)
    for file in [*running[::-1], finished]:
        if file.exists():
            return file
    raise Refused(f"there is neither work/{stage}/*/{name} nor {finished}; name a training stage that was started here")
