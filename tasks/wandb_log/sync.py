"""`cf wandb sync` sends to W&B what it does not have, by W&B's own `sync`, one run at a time. `cf wandb list` shows the runs.

Runs of this checkout and of the worktrees below .runs. Safe to start again at any time: W&B marks what it has sent (.synced), and a
run whose process lives is left alone. Of a killed run W&B's file lacks the last seconds; the attempt that continues it has them.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.files.locks import read_holder
from tasks.files.options import parse_options
from tasks.files.words import count_things

from .run import MARK, explain_unreachable, hide_key

HEADER_BYTES = 7  # of W&B's file, which holds nothing else when a run is killed in its first seconds


@dataclass(frozen=True)
class LocalRun:
    """A run's folder as W&B names it: <home>/wandb/[offline-]run-<start>-<id>."""

    folder: Path
    offline: bool
    start: str  # local time, as YYYYMMDD_HHMMSS
    id: str

    @property
    def state(self) -> str:
        """runs | empty (killed in its first seconds) | killed (what its file has is not sent yet) | waits (to be sent) | sent."""
        mark = self.folder.with_name(f"{MARK}{self.id}")
        marked = mark.exists()  # it lives, was killed, or ended before the server had taken all of it
        if read_holder(mark)[0]:
            return "runs"
        if any(self.folder.glob("*.wandb.synced")) or not (self.offline or marked):
            return "sent"
        if sum(file.stat().st_size for file in self.folder.glob("*.wandb")) <= HEADER_BYTES:
            return "empty"
        return "killed" if self.offline and marked else "waits"

    @property
    def command(self) -> list[str]:
        online = [] if self.offline else ["--include-online"]
        return [sys.executable, "-m", "wandb", "sync", *online, str(self.folder)]


def list_runs(root: Path) -> list[LocalRun]:
    """List the runs of WANDB_DIR, of this checkout and of its worktrees: what made an artifact comes before what used it.

    By the times of their first files, because their names have local times, which come twice when clocks are set back, and a folder's
    own time is that of its last change.
    """
    homes = [Path(os.environ.get("WANDB_DIR") or root / "runtime"), root / "runtime", *sorted(root.glob(".runs/*/runtime"))]
    places = dict.fromkeys(home.resolve() / "wandb" for home in homes)
    named = [(folder, re.fullmatch(r"(offline-)?run-([^-]+)-(.+)", folder.name)) for place in places for folder in place.glob("*run-*-*")]
    runs = [LocalRun(folder, bool(match[1]), match[2], match[3]) for folder, match in named if match]
    return sorted(runs, key=lambda run: (find_beginning(run.folder), run.start))


def find_beginning(folder: Path) -> int:
    """Return when the first of a folder's files was written, in nanoseconds; of an empty folder, when it was made."""
    return min((file.lstat().st_mtime_ns for file in folder.rglob("*") if file.is_file()), default=folder.stat().st_mtime_ns)


def send_run(run: LocalRun, seconds: float) -> None:
    """Send a run by W&B's own command, whose mark, not its exit code, says that W&B has it. Raises TimeoutError or RuntimeError."""
    home = str(run.folder.parents[1])
    variables = {"WANDB_DIR": home, "WANDB_DATA_DIR": f"{home}/wandb-data", "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "online"}
    try:
        done = subprocess.run(run.command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{run.id} was not sent within {seconds:g} s") from None
    if run.state != "sent":
        raise RuntimeError(f"{run.id} was not sent: {find_reason(done.stderr + done.stdout)}")


def find_reason(output: str) -> str:
    """Return the line of W&B's output that says why, without the key."""
    lines = [line.removeprefix("wandb: ").strip() for line in output.splitlines() if line.strip()]
    return hide_key(([line for line in lines if "error" in line.lower()] or lines or ["wandb printed nothing"])[-1])


@contextmanager
def hold_sync_lock(root: Path) -> Iterator[None]:
    """Hold the lock of `cf wandb sync`, because two at once would send everything twice."""
    lock = root / "runtime/wandb-sync.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise RuntimeError("another `cf wandb sync` is at work here; wait for it to end") from None


def send_runs(runs: list[LocalRun], seconds: float) -> int:
    """Send runs and return how many W&B does not have then.

    A refused run does not hold up the others; without a connection the rest is left for the next time.
    """
    refused = 0
    if problem := explain_unreachable():
        print(f"{problem}; {_say_waiting(len(runs))}, start `cf wandb sync` again when there is a connection", file=sys.stderr)
        return len(runs)
    for place, run in enumerate(runs):
        try:
            send_run(run, seconds)
            print(f"sent       {run.id}", flush=True)
        except (RuntimeError, TimeoutError) as error:
            print(error, file=sys.stderr)
            refused += 1
            if isinstance(error, TimeoutError) or explain_unreachable():
                left = refused + len(runs) - place - 1
                print(f"{_say_waiting(left)} for the next `cf wandb sync`", file=sys.stderr)
                return left
    return refused


def main(argv: list[str]) -> None:
    args = parse_options("wandb", argv)
    root = Path.cwd()
    if args.verb == "list":
        for state, start, run_id in [("state", "started", "id"), *((run.state, run.start, run.id) for run in list_runs(root))]:
            print(f"{state:<6}  {start:<15}  {run_id}")
        return
    with nullcontext() if args.dry_run else hold_sync_lock(root):
        waiting = [run for run in list_runs(root) if run.state in ("waits", "killed")]
        if args.dry_run:
            print("".join(f"{run.id}: {' '.join(['wandb', *run.command[3:]])}\n" for run in waiting), end="")
        if args.dry_run or not waiting:
            print(f"{_say_waiting(len(waiting))} to be sent")
        elif send_runs(waiting, args.timeout):
            sys.exit(1)


def _say_waiting(number: int) -> str:
    return f"{count_things(number, 'run')} {'waits' if number == 1 else 'wait'}"
