"""`cf wandb sync`: completes the runs that were killed, then sends to W&B what it does not have. `cf wandb list` shows them.

Reads the journals that tasks/wandb_log/journal.py writes, of this checkout and of the worktrees below .runs. Safe to start again at any
time: what was sent says so in its journal, or has W&B's own mark (.synced), and is left alone; so is what still runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600  # seconds for one run; W&B itself tries for ever


@dataclass(frozen=True)
class Run:
    """One run's journal folder, what it says, and what that means: runs | killed | lost (W&B stopped in it) | waits | sent."""

    journal: Path
    about: Mapping[str, Any]

    @property
    def home(self) -> Path:
        return self.journal.parents[1]

    @property
    def folder(self) -> Path:
        return Path(self.about.get("folder") or self.journal / "none")

    @property
    def state(self) -> str:
        if alive(self.journal / "metrics.jsonl"):
            return "runs"
        if "exit_code" not in self.about:
            return "killed"
        if self.about.get("sent") or self.marked:  # the first outlives the folder, which housekeeping may take away
            return "sent"
        return "lost" if self.about.get("broken") or not any(self.folder.glob("*.wandb")) else "waits"

    @property
    def marked(self) -> bool:
        """By W&B itself, which sent it."""
        return any(self.folder.glob("*.wandb.synced"))

    @property
    def rows(self) -> int:
        file = self.journal / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


def alive(rows: Path) -> bool:
    """Does its process hold the lock? The kernel frees it when the process is gone, however it went."""
    if not rows.exists():
        return False
    with rows.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def runs(root: Path) -> list[Run]:
    """Of this checkout, of its worktrees, and of WANDB_DIR, in the order they started: who made an artifact comes before who used it."""
    homes = [Path(os.environ.get("WANDB_DIR") or root / "runtime"), root / "runtime", *sorted(root.glob(".runs/*/runtime"))]
    places = dict.fromkeys(home.resolve() / "journal" for home in homes)
    found = [run for place in places for file in sorted(place.glob("*/run.json")) if (run := read(file))]
    return sorted(found, key=lambda run: float(run.about["started"]))


def read(file: Path) -> Run | None:
    try:
        return Run(file.parent, json.loads(file.read_text()))
    except (OSError, ValueError) as error:  # a power cut, or another user's
        print(f"{file} can't be read ({error}); its run is left out", file=sys.stderr)
    return None


def complete(run: Run) -> Run:
    """In a process of its own, in the folder where the stage ran: its paths are relative to that."""
    where = run.about.get("cwd")
    cwd = where if where and Path(where).is_dir() else Path.cwd()
    given = environment(run) | {"WANDB_MODE": "offline", "PYTHONPATH": ours()}
    command = [sys.executable, "-m", "tasks.wandb_log.rebuild", str(run.journal)]
    done = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise RuntimeError(f"{run.about['id']} could not be completed from {run.journal}: {last(done.stderr)}")
    return Run(run.journal, json.loads((run.journal / "run.json").read_text()))


def ours() -> str:
    return os.pathsep.join([str(Path.cwd()), *sys.path])


def command(run: Run) -> list[str]:
    online = ["--include-online"] if run.about["mode"] == "online" else []  # one that was online and is not all there
    return [sys.executable, "-m", "wandb", "sync", *online, str(run.folder)]


def send(run: Run, patience: float) -> None:
    """By W&B's own command. Its mark, not its exit code, says that the run is there. Raises TimeoutError or RuntimeError."""
    given = environment(run) | {"WANDB_MODE": "online"}
    try:
        done = subprocess.run(command(run), env=given, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{run.about['id']} was not sent within {patience:g} s") from None
    if not run.marked:
        raise RuntimeError(f"{run.about['id']} was not sent: {last(done.stderr + done.stdout)}")
    note_sent(run)


def note_sent(run: Run) -> None:
    file = run.journal / "run.json"
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as text:
        json.dump({**run.about, "sent": True}, text, indent=1, sort_keys=True)
        text.flush()
        os.fsync(text.fileno())
    partial.replace(file)


def environment(run: Run) -> dict[str, str]:
    home = str(run.home)
    return {**os.environ, "WANDB_DIR": home, "WANDB_DATA_DIR": str(run.home / "wandb-data"), "WANDB_ERROR_REPORTING": "false"}


def last(said: str) -> str:
    """The line that says why; never the key."""
    lines = [line.removeprefix("wandb: ").strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
    key = os.environ.get("WANDB_API_KEY")
    return errors[-1].replace(key, "WANDB_API_KEY") if key else errors[-1]


def unreachable() -> str | None:
    """tasks/wandb_log/run.py knows where the server is; W&B itself would try for hours."""
    asked = [sys.executable, "-c", "from tasks import mirror; print(mirror.unreachable() or '')"]
    return subprocess.run(asked, env={**os.environ, "PYTHONPATH": ours()}, stdout=subprocess.PIPE, text=True).stdout.strip() or None


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Two at once would send everything twice."""
    lock = root / "runtime" / "journal" / "sync.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another `cf wandb sync` is at work here; wait for it to end") from None
        yield


def sync(root: Path, *, patience: float, dry: bool, only_complete: bool) -> int:
    """How many runs could not be completed or sent."""
    failed, waiting = 0, list[Run]()
    for run in runs(root):
        state = run.state
        if state in ("killed", "lost") and not dry:
            try:
                run = complete(run)
                print(f"completed  {run.about['id']}: {run.rows} rows of a run that was {state}")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(error, file=sys.stderr)
                failed += 1
                continue
        if state in ("waits", "killed", "lost"):
            waiting.append(run)
        elif state == "sent" and not run.about.get("sent") and not dry:  # a kill came between W&B's mark and our note
            note_sent(run)
    for run in waiting if dry else ():
        print(f"{run.about['id']}: {' '.join(['wandb', *command(run)[3:]]) if run.state == 'waits' else 'would be completed, then sent'}")
    if dry or only_complete or not waiting:
        print(f"{len(waiting)} runs wait to be sent")
        return failed
    return failed + send_all(waiting, patience)


def send_all(waiting: list[Run], patience: float) -> int:
    """How many W&B does not have then. One that it refuses does not hold up the others; without a connection none would go."""
    refused = 0
    if why := unreachable():
        print(f"{why}; {len(waiting)} runs wait, start `cf wandb sync` again when there is a connection", file=sys.stderr)
        return len(waiting)
    for place, run in enumerate(waiting):
        try:
            send(run, patience)
            print(f"sent       {run.about['id']}")
        except (RuntimeError, TimeoutError) as error:
            print(error, file=sys.stderr)
            refused += 1
            if isinstance(error, TimeoutError) or unreachable():
                left = refused + len(waiting) - place - 1
                print(f"{left} runs wait for the next `cf wandb sync`", file=sys.stderr)
                return left
    return refused


def table(root: Path) -> str:
    found = runs(root)
    rows = [("state", "stage", "run of the pipeline", "rows", "exit", "id")]
    for run in found:
        about = run.about
        rows.append((run.state, about["job_type"], about["group"], str(run.rows), str(about.get("exit_code", "–")), about["id"]))
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, wide, strict=True)).rstrip() for row in rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf wandb", description="Offline runs: show them, complete the killed ones, send them.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("sync", help="complete killed runs from their journals, then send what W&B lacks")
    one.add_argument("--dry-run", action="store_true", help="only say what would be done")
    one.add_argument("--complete", action="store_true", help="complete killed runs, send nothing")
    one.add_argument("--timeout", type=float, default=PATIENCE, help=f"seconds for one run; default {PATIENCE}")
    commands.add_parser("list", help="runs of this checkout and its worktrees, and which of them W&B has")
    given = parser.parse_args(argv)
    root = Path.cwd()
    if given.command == "list":
        print(table(root))
        return
    with nullcontext() if given.dry_run else alone(root):
        if sync(root, patience=given.timeout, dry=given.dry_run, only_complete=given.complete):
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
