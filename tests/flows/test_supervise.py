"""Real processes: nothing of a command outlives its end, its cancellation, or whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.supervise import command as supervise
from flows.supervise import guardian

ROOT = Path(__file__).parents[2]
# a child in a session of its own whose parent is gone, and one that is still there; both ignore SIGTERM, and so does the command
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
orphan = f"import subprocess as s, sys; p = s.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True); print(p.pid, flush=True)"
subprocess.run([sys.executable, "-c", orphan], start_new_session=True)
print(subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True).pid, os.getpid(), flush=True)
time.sleep(600)
"""
STARTER = """
import sys
from pathlib import Path
from flows.supervise import command
command.run([sys.executable, "-c", sys.argv[1]], cwd=Path.cwd(), line=lambda said: print(said, flush=True))
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it a line is two writes, and those of two processes mix
    supervise.allow_commands()
    yield
    supervise.allow_commands()


def gone(pids: list[int], within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Family:
    """FAMILY under supervise.run in a process of its own, once all of it has said that it ignores SIGTERM."""

    def __init__(self) -> None:
        words, environment = [sys.executable, "-c", STARTER, FAMILY], {**os.environ, "PYTHONPATH": str(ROOT), "CF_GRACE": "1"}
        self.starter = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        said = [(self.starter.stdout.readline() if self.starter.stdout else "").split() for _ in range(4)]
        self.pids = [int(word) for words in said for word in words if word.isdecimal()]
        assert len(self.pids) == 3 and sum(words == ["ready"] for words in said) == 2, said
        (self.guardian,) = psutil.Process(self.starter.pid).children()

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        self.starter.kill()
        self.starter.wait()
        if self.starter.stdout:
            self.starter.stdout.close()
        for pid in self.pids:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def test_lines_come_one_by_one_and_the_code_is_the_commands(tmp_path: Path) -> None:
    came: list[tuple[float, str]] = []
    script = "import sys, time; print('a', flush=True); time.sleep(0.5); print('b', file=sys.stderr, flush=True); sys.exit(7)"
    code = supervise.run([sys.executable, "-c", script], cwd=tmp_path, line=lambda said: came.append((time.monotonic(), said)))
    assert code == 7 and [said for _, said in came] == ["a", "b"]
    assert came[1][0] - came[0][0] > 0.3, "both at the end is not line by line"


def test_a_command_ended_by_a_signal_says_which(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert supervise.run([sys.executable, "-c", script], cwd=tmp_path, line=print) == 128 + signal.SIGSEGV


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    said: list[str] = []
    left = "import subprocess as s, sys; print(s.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).pid)"
    assert supervise.run([sys.executable, "-c", left], cwd=tmp_path, line=said.append) == 0
    assert not lives(int(said[0]))


def test_it_takes_no_longer_than_its_timeout(tmp_path: Path) -> None:
    said: list[str] = []
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(TimeoutError, match=r"longer than its 1\.5 s"):
        supervise.run([sys.executable, "-c", script], cwd=tmp_path, line=said.append, timeout=1.5)
    assert not lives(int(said[0]))


def test_stop_ends_what_runs_and_lets_nothing_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_GRACE", "1")
    said, raised = [], list[BaseException]()

    def run() -> None:
        try:
            supervise.run([sys.executable, "-c", FAMILY], cwd=tmp_path, line=said.append)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until = time.monotonic() + 30
    while len(said) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    supervise.stop_commands()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], supervise.Stopped)
    assert gone([int(word) for words in said for word in words.split() if word.isdecimal()], within=0.5)
    with pytest.raises(supervise.Stopped):
        supervise.run([sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path, line=said.append)


def test_an_error_in_the_listener_ends_the_command(tmp_path: Path) -> None:
    heard: list[int] = []

    def line(said: str) -> None:
        heard.append(int(said))
        raise KeyError(said)

    with pytest.raises(KeyError):
        supervise.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], cwd=tmp_path, line=line)
    assert not lives(heard[0])


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_nothing_outlives_whoever_started_it(how: str) -> None:
    """kill -9 of the process that supervises, and the same process asked to end."""
    with Family() as family:
        os.kill(family.starter.pid, signal.Signals[how])
        assert gone(family.pids, within=10), [pid for pid in family.pids if lives(pid)]
        assert gone([family.guardian.pid], within=2)


def test_a_cancelled_process_group_ends_with_its_family() -> None:
    """What Prefect does: SIGTERM to the group of the flow's process, which the command is not in."""
    with Family() as family:
        os.killpg(family.starter.pid, signal.SIGTERM)
        assert gone([*family.pids, family.starter.pid], within=10)


def test_nothing_outlives_the_guardian() -> None:
    with Family() as family:
        family.guardian.kill()
        assert gone(family.pids, within=10)
        family.starter.wait(10)  # and whoever waits for the command is told


def test_what_outlives_both_is_swept_up_later() -> None:
    with Family() as family:
        family.starter.send_signal(signal.SIGSTOP)  # so that it can't clean up behind the guardian
        family.guardian.kill()
        family.starter.kill()
        time.sleep(0.5)
        left = {pid for pid in family.pids if lives(pid)}
        assert left, "nothing was left, so this tests nothing"
        assert left <= set(supervise.end_orphans())  # with what others on this machine have left, at most
        assert not any(lives(pid) for pid in family.pids)


def test_what_a_marked_process_has_started_is_swept_up_when_it_is_dead() -> None:
    """As the temporary server of a flow that was killed."""
    sleep = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)"
    script = f"from flows.supervise import command; import time; command.mark_environment(); {sleep}; time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    left = int(flow.stdout.readline() if flow.stdout else 0)
    assert left not in supervise.end_orphans() and lives(left)
    flow.kill()
    flow.wait()
    assert lives(left)
    assert left in supervise.end_orphans() and not lives(left)


def test_the_sweep_leaves_alone_what_has_its_guardian() -> None:
    with Family() as family:
        assert {mark.split(":")[1] for process, mark in guardian.find_marked() if process.pid in family.pids} == {str(family.guardian.pid)}
        assert not set(supervise.end_orphans()) & set(family.pids)
        assert all(lives(pid) for pid in family.pids)


def test_a_mark_is_of_one_process_in_one_namespace() -> None:
    own = guardian.make_mark("word")
    assert guardian.is_alive(own)
    assert not guardian.is_alive(f"word:{os.getpid()}:{guardian.read_start(1)}:{guardian.read_namespace()}"), "another had the number"
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    both = [subprocess.Popen(sleeper, env={**os.environ, guardian.MARK: mark}) for mark in (own, "word:1:2:pid:[3]")]
    found = {process.pid for process, _ in guardian.find_marked()} & {one.pid for one in both}
    for one in both:
        one.kill()
        one.wait()
    assert found == {both[0].pid}, "the other is a container's"


def test_the_guardian_has_no_mark_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guardian.MARK, "")  # so that the one that mark() sets is gone after this test
    supervise.mark_environment()
    said, carrying = list[str](), list[int]()

    def line(text: str) -> None:
        said.append(text)
        carrying.extend(process.pid for process, _ in guardian.find_marked())

    script = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(1)"
    supervise.run([sys.executable, "-c", script], cwd=tmp_path, line=line)
    command, its_guardian = map(int, said[0].split())
    assert command in carrying and its_guardian not in carrying


def test_elsewhere_than_linux_psutil_finds_the_family(tmp_path: Path) -> None:
    """Without prctl nobody inherits orphans, and the mark in their environment is all that tells whose they are."""
    script = tmp_path / "guardian.py"
    script.write_text(Path(guardian.__file__).read_text().replace('sys.platform == "linux"', "False"))
    said = tmp_path / "said"
    with said.open("w") as out:
        words = [sys.executable, str(script), "word", "1", sys.executable, "-c", FAMILY]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=out)
    until = time.monotonic() + 30
    while len(said.read_text().splitlines()) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    pids = [int(word) for word in said.read_text().split() if word.isdecimal()]
    assert len(pids) == 3
    if process.stdin:
        process.stdin.close()  # as when whoever started it has died
    assert process.wait(10) == 143
    assert gone(pids, within=1)
