"""A real S3 endpoint on loopback, in a process of its own that can be frozen and killed, and clones that share nothing else."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
import requests

from tests.once import copy_of
from tests.preloaded import python_folder

BUCKET = "clips"
CREDENTIALS = {  # moto believes any; without the third, a missing credential would be looked for at an address of Amazon's
    "AWS_ACCESS_KEY_ID": "AKIAFORTESTSONLY",
    "AWS_SECRET_ACCESS_KEY": "for-tests-only",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "DVC_NO_ANALYTICS": "true",
}
STAGE = """import sys
from pathlib import Path

name, count, *reads = sys.argv[1:]
here = Path.cwd()
with (here.parent / "ran.txt").open("a") as file:
    file.write(f"{here.name} {name}\\n")
words = "".join(one.read_text() for read in reads for one in sorted(Path(read).iterdir()))
Path("out", name).mkdir(parents=True)
for number in range(int(count)):
    Path("out", name, f"{number:03}.txt").write_text(f"{name} {number} {len(words)}\\n" * 40)
"""
PIPELINE = """stages:
  clips:
    cmd: python stage.py clips 150
    deps: [stage.py]
    outs: [out/clips]
  teacher:
    cmd: python stage.py teacher 5 out/clips
    deps: [stage.py, out/clips]
    outs: [out/teacher]
  report:
    cmd: python stage.py report 1 out/teacher
    deps: [stage.py, out/teacher]
    outs: [out/report]
"""
FILES, FEW = 150, 10  # that a push or pull can be caught in the middle of, and where that does not matter


class Store:
    """moto keeps everything in memory: what was killed has forgotten all, what was frozen has not."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "store.log"
        self.start()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **CREDENTIALS})
        wait(self._answers, 60, "the store to answer")
        self.empty()

    def empty(self) -> None:
        requests.post(f"{self.url}/moto-api/reset", timeout=10).raise_for_status()
        requests.put(f"{self.url}/{BUCKET}", timeout=10).raise_for_status()
        self.forget_requests()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/moto-api/", timeout=2).ok
        except requests.ConnectionError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Connections stay open and nothing is answered: what a hanging server or a dropped cable looks like."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def client(self) -> Any:
        stated = {"aws_access_key_id": CREDENTIALS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **stated)

    def objects(self) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="cf/files/")
        return [one["Key"] for page in pages for one in page.get("Contents", [])]

    def requests(self, verb: str) -> int:
        """How often files were sent (PUT) or taken (GET) since the log was last emptied; also from one that is frozen."""
        return sum(f'"{verb} /{BUCKET}/cf/files/' in line for line in self.log.read_text(errors="replace").splitlines())

    def forget_requests(self) -> None:
        os.truncate(self.log, 0)

    def damage(self, content: bytes) -> None:
        """The object that holds it now holds something else."""
        md5 = hashlib.md5(content).hexdigest()
        self.client().put_object(Bucket=BUCKET, Key=f"cf/files/md5/{md5[:2]}/{md5[2:]}", Body=b"damaged")


class Machine:
    """A clone, with a DVC cache of its own."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.root = folder
        subprocess.run(["git", "clone", "--quiet", str(source), str(folder)], check=True)

    def moved(self, folder: Path) -> Machine:
        """The same in another place, with all it has made."""
        other = copy.copy(self)
        other.root = folder / self.root.name
        shutil.copytree(self.root, other.root, symlinks=True)
        if (self.root.parent / "ran.txt").exists():
            shutil.copy(self.root.parent / "ran.txt", folder)
        return other

    def dvc(self, *words: str, check: bool = True, env: Mapping[str, str] = CREDENTIALS) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            [python_folder() / "python", "-m", "dvc", *words],
            cwd=self.root,
            env={**os.environ, "PATH": path, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def ran(self) -> list[str]:
        """Stages that really ran here, in order."""
        file = self.root.parent / "ran.txt"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [stage for machine, stage in lines if machine == self.root.name]

    def results(self) -> dict[str, bytes]:
        files = [self.root / "dvc.lock", *self.root.glob("out/*/*")]
        return {str(file.relative_to(self.root)): file.read_bytes() for file in files if file.suffix != ".gitignore"}

    def cached(self) -> int:
        return sum(len(name.name) == 30 for name in (self.root / ".dvc/cache/files/md5").glob("*/*"))


def source(folder: Path, files: int = FILES) -> Path:
    """A repository with stages and no results. The first stage makes so many files, the others five and one."""
    return copy_of(f"three-stages-{files}", partial(write, files=files), folder)


def write(folder: Path, files: int) -> None:
    folder.mkdir()
    (folder / "dvc.yaml").write_text(PIPELINE.replace(f"clips {FILES}", f"clips {files}"))
    (folder / "stage.py").write_text(STAGE)
    for command in (["git", "init", "--quiet"], [python_folder() / "python", "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env={**os.environ, **CREDENTIALS}, check=True)
    commit(folder)


def commit(folder: Path) -> None:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", *who, "commit", "--quiet", "--allow-empty", "--message", "."], cwd=folder, check=True)


def copy_lock(one: Machine, other: Machine) -> None:
    shutil.copy(one.root / "dvc.lock", other.root / "dvc.lock")


def wait(ready: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.02)
