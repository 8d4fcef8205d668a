"""What all tests share. Shapes are checked while they run: jaxtyping's annotations, enforced by beartype, before anything of ours is
imported. Workers of pytest-xdist run side by side: what a test writes is below its own `tmp_path`, its ports are free ones."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tasks.params import yaml_file
from tests.once import shared_folder
from tests.order import AROUND, SECONDS
from tests.prefect_database import copy_database
from tests.remembered_yaml import RememberedYAML
from tests.shapes import check_package

ROOT = Path(__file__).parents[1]
USED: Counter[str] = Counter()  # file of tests -> seconds of the processor

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["CF_KEPT"] = "off"  # tests/test_kept.py asks for it
os.environ["WANDB_MODE"] = "disabled"  # whatever the shell says; the tests of the mirror ask for offline themselves
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ["PREFECT_HOME"] = str(shared_folder() / f"prefect-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")

check_package("cf_model")
yaml_file.YAML = RememberedYAML  # type: ignore[misc]
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """A real Prefect server, one for all tests of a worker, which have flow runs, and no deployments, in common."""
    from prefect.testing import utilities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "mkdtemp", lambda: str(copy_database(Path(tempfile.mkdtemp()), "prefect-test.db")))
        with utilities.prefect_test_harness(server_startup_timeout=600):
            yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker begins one when the others end, and are marked as slow."""

    def place(item: pytest.Item) -> str:
        return str(item.path.relative_to(ROOT / "tests"))

    items.sort(key=lambda item: -SECONDS.get(place(item), 0))  # which leaves the order within a file as it is
    for item in items:
        needs_server = "server" in getattr(item, "fixturenames", ())  # which takes a quarter of a minute to start
        if place(item) in SECONDS or place(item).startswith(AROUND) or needs_server:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", action="store_true", help="with -n0: the processor's seconds of each file, children included")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    began = sum(os.times()[:4])
    answer = yield
    USED[str(item.path)] += sum(os.times()[:4]) - began
    return answer


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a run of all tests leaves out. What was skipped, and why, `-rs` says."""
    if not os.environ.get("CF_SYSTEM"):
        terminalreporter.write_line("not run: tests/system, a real server, worker and browser (`make test-system`)")
    terminalreporter.write_line("not run: tests/week, seven nights and what goes wrong in them (`make test-week`)")
    if terminalreporter.config.getoption("--cpu-seconds"):
        for path, seconds in USED.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} s  {Path(path).relative_to(ROOT)}")
