"""`cf repro`, which `make repro` runs: `dvc repro`, with each stage's number and about how long it takes, and a summary."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tasks.files.dvc_rwlock import mend_rwlock
from tasks.files.json_lines import load_json_object
from tasks.files.key_numbers import read_key_numbers
from tasks.files.options import read_commands
from tasks.params.project import Project

DVC = ("dvc", "--wait-for-lock", "repro")
COMMITTED = Path("benchmarks/results/tiny-runtime.json")  # runtime/*.json of the run of profile tiny that is committed
ENOUGH = 10.0  # seconds of finished stages, in the committed run, from which this machine's speed is estimated


def main(argv: list[str]) -> None:
    """Run the stages that changed; options are DVC's, as in `cf repro -f -s generate`. Exit with 1 if a stage fails, 130 on Ctrl-C."""
    forecast = Forecast(Project(), Path())
    environment = {"CF_RUN": time.strftime("%Y%m%d-%H%M%S")} | os.environ
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    interrupts: list[int] = []
    if mended := mend_rwlock(Path()):
        print(mended, flush=True)
    # A terminal sends Ctrl-C to DVC and its stage too, which end by themselves; their last lines are still passed on.
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        # stderr is inherited, so that progress bars still find a terminal.
        with subprocess.Popen([*DVC, *argv], stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout or ():
                if stage := re.match(r"Running stage '([^']+)':", line):
                    print(forecast.describe(stage[1]), flush=True)
                print(line, end="", flush=True)
        if process.returncode:
            # DVC removes the outs of a stage before it runs it: the last good ones come back from the cache.
            subprocess.run(["dvc", "checkout", "--quiet"], stderr=subprocess.DEVNULL, env=environment)
            sys.exit(130 if interrupts else 1)
    finally:
        signal.signal(signal.SIGINT, before)
    print(read_commands()["repro"]["epilog"] if {"-h", "--help"} & set(argv) else summarize_run(Path.cwd()))


class Forecast:
    """About how long stages take: the committed run's seconds, scaled by the stages that this run has finished."""

    def __init__(self, project: Project, root: Path) -> None:
        self.stages, self.root, self.began = list(project.stages), root, time.time()
        facts = load_json_object(root / COMMITTED, missing_ok=True) if project.tree.get("profile") == "tiny" else {}
        self.seconds: dict[str, float] = {stage: entry["wall_seconds"] for stage, entry in facts.items()}

    def describe(self, stage: str) -> str:
        """Return the line before a stage: `3 of 13, stage filter, about 20 s`; without seconds where none were committed."""
        number = f"{self.stages.index(stage) + 1} of {len(self.stages)}, " if stage in self.stages else ""
        seconds = f", about {format_seconds(self.seconds[stage] * self.scale())}" if stage in self.seconds else ""
        return f"{number}stage {stage}{seconds}"

    def scale(self) -> float:
        """Return how much longer than in the committed run the stages of this run took so far; 1 until they are long enough."""
        files = [self.root / "runtime" / f"{stage}.json" for stage in self.seconds]
        files = [file for file in files if file.exists() and file.stat().st_mtime >= self.began]
        committed = sum(self.seconds[file.stem] for file in files)
        return sum(load_json_object(file)["wall_seconds"] for file in files) / committed if committed >= ENOUGH else 1.0


def format_seconds(seconds: float) -> str:
    """Return seconds as a person says them: `4 s`, `20 s`, `12 min`."""
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds, -1):.0f} s" if seconds < 95 else f"{round(seconds / 60)} min"


def summarize_run(root: Path) -> str:
    """Return the lines for the project in `root`; a number that no stage has written is `not measured`."""
    places = {"report": root / "reports/report.html", "videos": root / "samples"}
    lines = [f"{name:<42} {path}" for name, path in places.items() if path.exists()]
    for label, value in read_key_numbers(root).items():
        lines.append(f"{label:<42} " + ("not measured" if value is None else f"{value:.4g}"))
    return "\n".join(lines)
