from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess

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
    [(killed, 60.0, "bad crashed its reader"), (hanging, 1.0, "bad was not read within 1 s"), (refusing, 60.0, "bad is bad; replace it")],
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
