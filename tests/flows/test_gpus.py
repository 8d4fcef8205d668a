"""GPU locks with real processes; the GPUs need not be there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.supervise import command, gpus

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from flows.supervise import gpus
with gpus.lock_gpus(int(sys.argv[1]), lambda said: None) as held:
    print(*held, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("CF_GPUS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command.allow_commands()


def holder(count: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLDER, str(count)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_the_lowest_free_ones_are_taken() -> None:
    one = holder(1)
    assert said(one) == "0"
    with gpus.lock_gpus(1, print) as held:
        assert list(held) == [1]
        assert gpus.find_holders() == {0: one.pid, 1: os.getpid()}
    assert gpus.find_holders() == {0: one.pid, 1: None}
    end(one)
    with gpus.lock_gpus(2, print) as held:
        assert list(held) == [0, 1]


def test_the_kernel_frees_a_lock_when_its_holder_is_killed() -> None:
    one = holder(2)
    assert said(one) == "0 1"
    two = holder(1)
    time.sleep(1)
    assert two.poll() is None and gpus.find_holders() == {0: one.pid, 1: one.pid}
    one.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert said(two) == "0"
    assert time.monotonic() - killed < 5
    end(one, two)


def test_one_that_wants_many_is_not_passed_by_those_that_want_few() -> None:
    first = holder(1)
    assert said(first) == "0"
    order: list[str] = []
    heard = threading.Event()

    def take(name: str, count: int) -> None:
        with gpus.lock_gpus(count, lambda text: heard.set()):
            order.append(name)

    many = threading.Thread(target=take, args=("many", 2))
    many.start()
    assert heard.wait(10), "it says that it waits"
    few = threading.Thread(target=take, args=("few", 1))
    few.start()
    time.sleep(2 * gpus.PAUSE)
    assert order == [], "GPU 1 is free, and kept for the one that came first"
    end(first)
    many.join(20)
    few.join(20)
    assert order == ["many", "few"]


def test_those_that_want_all_do_not_hold_half_of_them_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_GPUS", "4")
    got: list[int] = []
    given = [ExitStack() for _ in range(4)]
    for one in given:
        one.enter_context(gpus.lock_gpus(1, print))

    def take(number: int) -> None:
        with gpus.lock_gpus(4, lambda text: None):
            got.append(number)

    threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for one in given:  # each comes free alone, for whoever looks first
        time.sleep(1.5 * gpus.PAUSE)
        one.close()
    for thread in threads:
        thread.join(20)
    assert sorted(got) == [0, 1, 2, 3]


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a stage asks for 3 GPUs, and this machine gives away 2"), gpus.lock_gpus(3, print):
        pass


def test_who_waits_for_a_gpu_can_be_stopped(tmp_path: Path) -> None:
    waits = threading.Event()

    def run() -> None:
        with pytest.raises(InterruptedError, match="stopped while waiting"):
            command.run([sys.executable, "-c", ""], cwd=tmp_path, line=lambda text: waits.set(), gpus=1)

    with gpus.lock_gpus(2, print):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert waits.wait(10)
        command.stop_commands()
        thread.join(2)
        assert not thread.is_alive()


def test_another_user_can_open_the_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        with gpus.lock_gpus(1, print):
            files = list(gpus.lock_folder().iterdir())
    finally:
        os.umask(before)
    assert len(files) == 2 and all(file.stat().st_mode & 0o777 == 0o666 for file in files)

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(gpus.os, "open", refuse)
    with pytest.raises(ValueError, match=r"gpus\.lock is another user's: `chmod a\+rw` it"), gpus.lock_gpus(1, print):
        pass


def test_a_home_may_be_shared_by_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CF_GPU_LOCKS")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, folder in {"node-1": "node-1", "../a.b": "___a_b", "": "here"}.items():
        monkeypatch.setattr(gpus.platform, "node", lambda name=name: name)
        assert gpus.lock_folder() == tmp_path / ".cache/cf" / folder


def test_which_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.list_gpus() == [0, 1]
    monkeypatch.delenv("CF_GPUS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert gpus.list_gpus() == [3, 5]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.list_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7b2c")
    with pytest.raises(ValueError, match="by their numbers"):
        gpus.list_gpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    assert gpus.list_gpus() == [0, 1], "as CUDA counts them in a container that has no others"


def test_a_command_sees_its_own_gpus_only(tmp_path: Path) -> None:
    script = [sys.executable, "-c", "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"]
    one = holder(1)
    assert said(one) == "0"
    lines: list[str] = []
    assert command.run(script, cwd=tmp_path, line=lines.append, gpus=1) == 0
    assert command.run(script, cwd=tmp_path, line=lines.append) == 0
    end(one)
    assert lines == ["GPUs 1", "sees 1", "sees "]


def test_a_lock_is_kept_until_the_last_process_of_the_command_is_dead(tmp_path: Path) -> None:
    """The flow's process is killed and its stage takes a while to end: nobody else gets the GPU meanwhile."""
    stage = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), exit())); print('up', flush=True); time.sleep(600)"
    )
    starter = "import sys; from pathlib import Path; from flows.supervise import command; "
    starter += "command.run([sys.executable, '-c', sys.argv[1]], cwd=Path.cwd(), line=lambda said: print(said, flush=True), gpus=2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", starter, stage], env=environment, stdout=subprocess.PIPE, text=True)
    assert said(flow) == "GPUs 0, 1" and said(flow) == "up"
    flow.kill()
    time.sleep(1)
    assert gpus.find_holders() == {0: flow.pid, 1: flow.pid}
    end(flow)
    with gpus.lock_gpus(2, print) as held:
        assert list(held) == [0, 1]
