"""Several processes for one stage: one a GPU, or CF_RANKS of them. How many is no parameter and changes no result but rounding.

`cf stage2` starts them and only waits. Rank 0 is the stage as ever (tasks/runner/execute.py); the others compute their share of the
batch and write nothing. When one dies the rest are ended, and what it died of is said once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.params.yaml_file import Refused

from . import execute
from . import track as tracking

STAGES = ("base", "teacher", "causal_init", "stage1", "stage2")
PATIENCE = 2.0  # seconds between asking the other ranks to end, asking again, and ending them


def wanted(stage: str, stated: Mapping[str, Any]) -> int:
    """How many processes this stage should have, from the environment alone."""
    gpus, given = _gpus(), os.environ.get("CF_RANKS", "")
    if given and not (given.isdecimal() and int(given)):
        raise Refused(f"CF_RANKS is {given}; use a whole number from 1 on")
    if given and 1 <= gpus < int(given):
        raise Refused(f"CF_RANKS is {given}, but there are {gpus} GPUs; use at most that, or the CPU by CUDA_VISIBLE_DEVICES=''")
    if stage not in STAGES or (stage == "base" and stated.get("base", {}).get("init") == "wan"):
        return 1
    return int(given) if given else max(gpus, 1)


def _gpus() -> int:
    """Without torch, which takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])


# --------------------------------------------------------------------------------------------------- the one that waits


def launch(stage: str, count: int) -> int:
    """This command, in `count` processes; the exit code of the stage."""
    with tempfile.TemporaryDirectory(prefix="cf-ranks-") as folder:
        workers = []
        for rank in range(count):
            own = {"CF_RANK": str(rank), "CF_RANKS": str(count), "CF_MEETING": folder}
            # DeepSpeed calls torch by names that torch has new ones for, and says so at every call
            local = {"PYTHONWARNINGS": "ignore::FutureWarning"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
            command = [sys.executable, *sys.orig_argv[1:]]
            with (Path(folder) / f"stderr-{rank}").open("w") as aside:  # what all of them say is said once
                workers.append(subprocess.Popen(command, env={**local, **os.environ, **own}, stderr=aside if rank else None))
        before = signal.signal(signal.SIGTERM, lambda *_: _tell(workers, signal.SIGTERM))
        try:
            failed = _wait(workers)
            if not failed:
                return max(worker.returncode for worker in workers)  # 143: asked to stop
            cause = _cause(failed, Path(folder))
            code = failed.get(cause, 1)
            print(f"cf {stage}: rank {cause} of {count} {_story(cause, code, Path(folder))}", file=sys.stderr)
            return code if code > 0 else 128 - code
        except KeyboardInterrupt:  # the terminal has told the workers too
            return 130
        finally:
            _end(workers)
            signal.signal(signal.SIGTERM, before)


def _wait(workers: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Until all have ended well, or were asked to stop (143): {}. Else the ranks that failed, and how, before any was ended."""
    while True:
        codes = {rank: worker.poll() for rank, worker in enumerate(workers)}
        failed = {rank: code for rank, code in codes.items() if code is not None and code not in (0, 143)}
        if failed:
            return failed
        if None not in codes.values():
            return {}
        time.sleep(0.05)


def _cause(failed: dict[int, int], folder: Path) -> int:
    """The rank that was the first to fail; the others fail because of it. A rank that was killed could not write why. Any other
    writes before it goes, and is missed by the rest only when it has gone, so the oldest report is the cause."""
    killed = [rank for rank, code in failed.items() if code < 0]
    reports = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    return next(iter([*killed, *(int(report.name.split("-")[1]) for report in reports), *failed]))


def _story(rank: int, code: int, folder: Path) -> str:
    report = folder / f"error-{rank}"
    heard = "".join(f"\n  {line}" for line in (folder / f"stderr-{rank}").read_text().splitlines()[-20:])
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}; the last checkpoint is intact, the same command goes on from there{heard}"
    return f"stopped: {report.read_text().strip()}" if report.exists() else f"ended with code {code}{heard}"


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        _tell(workers, number)
        until = time.monotonic() + PATIENCE
        while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
            time.sleep(0.05)


def _tell(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


# ----------------------------------------------------------------------------------------------------- the ones that work


def rank() -> int | None:
    """Of this process; None in one that no launcher started."""
    given = os.environ.get("CF_RANK")
    return None if given is None else int(given)


def meeting() -> Path:
    return Path(os.environ["CF_MEETING"])


def join() -> None:
    """Meets the other ranks. torch is there by now: the stage has imported it."""
    import torch
    import torch.distributed as dist

    threading.Thread(target=_end_with_the_launcher, args=(os.getppid(),), daemon=True).start()
    here, count = rank() or 0, int(os.environ["CF_RANKS"])
    if torch.cuda.is_available():
        torch.cuda.set_device(here)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting() / 'store'}", rank=here, world_size=count)


def _end_with_the_launcher(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def failed(said: str, code: int) -> None:
    """Leaves what this rank died of to the launcher and goes at once: the others are waiting for it."""
    partial = meeting() / f".error-{rank()}"
    partial.write_text(said)
    partial.rename(meeting() / f"error-{rank()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def announce(work: Path) -> None:
    """Rank 0 has the working folder; the others may read its checkpoints."""
    if rank() == 0:
        tracking.replace(meeting() / "work", str(work))


def follow(stage: str, run: Callable[..., Any], paths: Mapping[str, Any], params: Any) -> None:
    """The stage in a rank that is not the first: the same steps, nothing written."""
    execute.seed(params)
    while not (meeting() / "work").exists():
        time.sleep(0.05)
    track = Follower(stage, Path((meeting() / "work").read_text()))
    with execute.terminated_cleanly(track):
        run(params, track, **paths)


class Silent:
    def update(self, n: int = 1, **shown: float) -> None: ...

    def close(self) -> None: ...


class Follower(tracking.Track):
    """Says nothing, and ends its process where the first rank begins to save the model."""

    first = False

    def log(self, step: int, **values: float) -> None: ...

    def time(self, step: int, seconds: Mapping[str, float], **memory: float) -> None: ...

    def resumed(self, step: int) -> None: ...

    def progress(self, total: int, unit: str = "step", start: int = 0) -> Any:
        return Silent()

    def stopped(self, step: int) -> None:
        raise SystemExit(143)

    def finished(self) -> None:
        raise SystemExit(0)
