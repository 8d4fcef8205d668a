from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cf_model.data.subprocess_reader import StreamingReader, Unreadable, read_in_subprocess

pytestmark = pytest.mark.slow  # processes start, hang and are killed
PATHS = [Path(name) for name in ("good-1", "bad", "good-2", "good-3")]


def killed(path: Path) -> str:
    if path.name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name.upper()


def hanging(path: Path) -> str:
    if path.name == "bad":
        time.sleep(60)
    return path.name.upper()


def refusing(path: Path) -> str:
    if path.name == "bad":
        raise ValueError(f"{path.name} is bad; replace it")
    return path.name.upper()


def faulty(path: Path) -> str:
    raise KeyError(path.name)


def modules(path: Path) -> list[str]:
    import cf_model.data.filter  # noqa: F401

    return [name for name in ("torch", "pydantic", "diffusers") if name in sys.modules]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("task", "timeout", "why"),
    [(killed, 60.0, "bad crashed its reader"), (hanging, 5.0, "bad was not read within 5 s"), (refusing, 60.0, "bad is bad; replace it")],
)
def test_a_bad_file_costs_only_itself(task: object, timeout: float, why: str, workers: int) -> None:
    found = dict(read_in_subprocess(task, PATHS, workers=workers, timeout=timeout))  # type: ignore[arg-type]
    bad = found.pop(1)
    assert isinstance(bad, Unreadable) and bad.sentence.startswith(why)
    assert found == {0: "GOOD-1", 2: "GOOD-2", 3: "GOOD-3"}


def test_a_fault_of_the_task_is_raised_and_not_blamed_on_the_file() -> None:
    with pytest.raises(KeyError):
        list(read_in_subprocess(faulty, PATHS, workers=2, timeout=60.0))


def test_no_files_no_children() -> None:
    assert list(read_in_subprocess(killed, [], workers=2, timeout=60.0)) == []


def test_readers_start_without_torch() -> None:
    """A second and 200 MB for each of them."""
    assert dict(read_in_subprocess(modules, PATHS[:1], workers=1, timeout=60.0)) == {0: []}


def count_up(path: Path, *, most: int = 3) -> Iterator[int]:
    """Yield numbers; the name says what happens after the second."""
    for number in range(most):
        if number == 2 and path.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2 and path.name == "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if number == 2 and path.name == "bad":
            raise ValueError("bad is bad; replace it")
        yield number


@pytest.mark.parametrize(
    ("name", "why"), [("dies", r"dies crashed its reader"), ("hangs", "hangs was not read on within 5 s"), ("bad", "bad is bad")]
)
def test_a_stream_ends_with_a_sentence_and_the_next_file_is_read(name: str, why: str) -> None:
    with StreamingReader(count_up, timeout=5.0) as reader:
        assert list(reader.stream(Path("good"))) == [0, 1, 2]
        stream = reader.stream(Path(name))
        assert [next(stream), next(stream)] == [0, 1]
        with pytest.raises(ValueError, match=why):
            next(stream)
        assert list(reader.stream(Path("good"), most=5)) == [0, 1, 2, 3, 4]


def test_a_stream_that_is_left_early_does_not_leak_into_the_next() -> None:
    with StreamingReader(count_up, timeout=60.0) as reader:
        stream = reader.stream(Path("good"), most=1000)
        assert next(stream) == 0
        stream.close()  # type: ignore[attr-defined]
        assert list(reader.stream(Path("good"))) == [0, 1, 2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_reader_that_hangs_dies_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\n"
        "from cf_model.data.subprocess_reader import StreamingReader\n"
        "from tests.data.test_apart import count_up\n"
        "if __name__ == '__main__':\n"
        "    with StreamingReader(count_up, timeout=600.0) as reader:\n"
        "        for number in reader.stream(Path('hangs')):\n"
        "            print(reader.process.pid, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.stdout.readline()
        parent.send_signal(how)
        parent.wait(30)
    for _ in range(300):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the reader outlives its parent")
