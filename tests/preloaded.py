"""A `python` whose libraries are loaded already, for tests that run many stages. torch, diffusers and transformers take seconds to
import, twelve times in a pipeline; here one process imports them, and each `python -m MODULE` or `python -c CODE` is a fork of it.

Of the project nothing is loaded: a fork imports it from its own folder, as a new interpreter would. The server is started with the
variables for which a stage would start itself again (tasks/runner/process.py); without them every fork is given up for a new interpreter.
`python_folder()` goes to the head of PATH; the `python` in it hands its words, folder, environment and open files to the server, hands
SIGTERM on to the fork, and ends as the fork ends, by the same signal too. When it is killed, so is the fork. What is to be tested as a
process (what it does at SIGTERM or at the death of its starter) is started without it, and the smoke profile in .ci/run is.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path

from tasks.runner.process import FIXED
from tests.once import made_once, session_lives

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors.torch", "peft", "scipy.stats", "scipy.ndimage", "pydantic", "ruamel.yaml")
LIBRARIES += ("yaml", "av", "PIL.Image", "jinja2", "matplotlib.pyplot", "networkx", "tqdm", "tokenizers", "jaxtyping", "psutil")
# DVC, which tests of flows start hundreds of times,
LIBRARIES += ("dvc.cli", "dvc.commands.repro", "dvc.commands.status", "dvc.commands.data_sync", "dvc.repo.reproduce", "dvc.stage.run")
LIBRARIES += ("dvc_s3", "s3fs")
# and Prefect, which commands of flows import; Prefect itself reads its settings as it is imported, and is therefore not here
LIBRARIES += ("pydantic_settings", "httpx", "pendulum", "rich.console", "jsonschema", "anyio", "fastapi", "sqlalchemy.ext.asyncio")
# what diffusers, transformers and pydantic load only when it is asked for
LIBRARIES += ("diffusers.models.transformers.transformer_wan", "diffusers.models.autoencoders.autoencoder_kl_wan")
LIBRARIES += ("diffusers.loaders.single_file_utils", "transformers.models.umt5.modeling_umt5", "pydantic.dataclasses", "torch._dynamo")
CLIENT = """#!/bin/sh
exec {python} -IS {folder}/client.py "$@"
"""
CLIENT_PY = """import json, os, signal, socket, sys
words = sys.argv[1:]
if words[0] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
told = json.dumps([words, os.getcwd(), dict(os.environ), {python!r}]).encode()
socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
server.sendall(told)
signal.signal(signal.SIGINT, signal.SIG_DFL)
fork = int.from_bytes(server.recv(4), "big")
signal.signal(signal.SIGTERM, lambda number, _: os.kill(fork, number))
code = server.recv(2)
if not code:
    sys.exit("the preloaded python is gone")
code = int.from_bytes(code, "big", signed=True)
if code >= 0:
    sys.exit(code)
if -code != signal.SIGKILL:
    signal.signal(-code, signal.SIG_DFL)
os.kill(os.getpid(), -code)
"""


# `python -m flows.pipeline` whose DVC has its libraries loaded too
FLOW = """import runpy
from flows.project import dvc_command
from tests.preloaded import PreloadedPython
dvc_command.sys = PreloadedPython()
runpy.run_module("flows.pipeline", run_name="__main__", alter_sys=True)
"""


def python_folder() -> Path:
    """To be the first of PATH."""
    return made_once("preloaded", _start) / "bin"


class PreloadedPython:
    """The `sys` of a module that starts commands; the preloaded python is started for the first who asks."""

    @property
    def executable(self) -> str:
        return str(python_folder() / "python")


def _start(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    place, python = folder / "socket", sys.executable
    (folder / "client.py").write_text(CLIENT_PY.format(python=python, socket=str(place)))
    (folder / "bin/python").write_text(CLIENT.format(python=python, folder=folder))
    (folder / "bin/python").chmod(0o755)
    root = str(Path(__file__).parents[1])
    with (folder / "log").open("w") as log:
        words = [python, "-m", "tests.preloaded", str(place)]
        process = subprocess.Popen(
            words, cwd=root, env=os.environ | FIXED, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 600
    while not place.exists():
        assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------ the server


def serve(place: Path) -> tuple[list[str], str, dict[str, str]]:
    """Until the session of tests is over. In a fork, it returns what is to be run there."""
    for name in LIBRARIES:
        __import__(name)
    gc.collect()
    gc.freeze()  # or a fork's garbage collector would copy all of it
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place.with_suffix(".partial")))
    listening.listen(64)
    place.with_suffix(".partial").rename(place)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while session_lives():
        if not select.select([listening], [], [], 1)[0]:
            continue
        asked, _ = listening.accept()
        if os.fork():
            asked.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, files, _, _ = socket.recv_fds(asked, 8, 3)
        told = b""
        while len(told) < int.from_bytes(size, "big"):
            told += asked.recv(1 << 20)
        words, folder, environment, python = json.loads(told)
        child = os.fork()
        if child:
            for file in files:
                os.close(file)
            _wait(asked, child)
        asked.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.executable = python
        return words, folder, environment
    raise SystemExit


def _wait(asked: socket.socket, child: int) -> None:
    """For the end of the fork, which the client is told, or of the client, which ends the fork."""
    watched = os.pidfd_open(child)
    with contextlib.suppress(OSError):
        asked.sendall(child.to_bytes(4, "big"))
    ready, _, _ = select.select([watched, asked], [], [])
    if watched not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        asked.sendall(code.to_bytes(2, "big", signed=True))
    os._exit(0)


def main() -> None:
    words, folder, environment = serve(Path(sys.argv[1]))
    code = 1
    try:
        run(words, folder, environment)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if code == 1 and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)  # to take all that is loaded apart would take seconds


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | FIXED)
    first, *words_left = words
    sys.path[0] = folder if first == "-m" else ""
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "tasks")]:
        del sys.modules[name]
    sys.orig_argv = [sys.executable, *words]
    if first == "-c":
        sys.argv = ["-c", *words_left[1:]]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(words_left[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = words_left
        runpy.run_module(words_left[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
