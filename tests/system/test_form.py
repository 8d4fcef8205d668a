"""The UI in a real browser: the form, a run from it, its graph and its artifacts, and a run that is cancelled."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.flows import project
from tests.system.driver import Machine, chromium, until


@pytest.fixture(scope="module")
def hosts() -> set[str]:
    return set()


@pytest.fixture(scope="module")
def window(hosts: set[str]) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1060})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname or ""))
        yield page
        browser.close()


def form(machine: Machine, page: Page, deployment: str = "pipeline") -> None:
    """As a person gets there: the deployments, the deployment, Run."""
    page.goto(f"{machine.url}/deployments")
    page.get_by_role("link", name=deployment, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    custom = page.get_by_text("Custom run")
    expect(custom.or_(page.get_by_role("button", name="Submit"))).to_be_visible()
    if custom.is_visible():
        custom.click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def choose(page: Page, shown: str, wanted: str) -> None:
    page.get_by_role("button", name=shown, exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.get_by_role("option", name=wanted, exact=True).click()


def override(page: Page, text: str) -> None:
    page.get_by_role("button", name="Add item").first.click()
    page.locator("textarea").last.fill(text)


def submitted(machine: Machine, page: Page) -> str:
    """The run that Submit has made."""
    before = {run["id"] for run in machine.call("/flow_runs/filter", {})}
    page.get_by_role("button", name="Submit").click()
    made: set[str] = set()

    def there() -> bool:
        made.update(run["id"] for run in machine.call("/flow_runs/filter", {}) if run["id"] not in before and not run["auto_scheduled"])
        return bool(made)

    try:
        until(there, "the form has made a run")
    except AssertionError as error:
        raise AssertionError(f"{error}; the page says: {page.inner_text('body')[-1500:]}") from None
    (run,) = made
    return run


def test_a_run_from_the_form_to_its_artifacts(machine: Machine, window: Page, shots: Path | None) -> None:
    form(machine, window)
    choose(window, "params.yaml", "smoke")
    override(window, "last.times=7")
    photograph(window, shots, "form")
    run = submitted(machine, window)
    window.goto(f"{machine.url}/runs/flow-run/{run}")
    expect(window.locator(".state-badge", has_text="Completed").first).to_be_visible(timeout=300_000)
    states = machine.tasks(run)
    assert states["last"] == "Completed" and set(states.values()) <= {"Completed", "Restored"}

    # what was asked for is committed on the run's branch
    stated = project.git(machine.root, "show", f"run/{machine.worktree(run).name}:params.yaml")
    assert "profile: smoke" in stated and re.search(r"last: \{fail: false, times: 7\}", stated)

    window.get_by_role("tab", name="Artifacts").or_(window.get_by_text("Artifacts", exact=True)).first.click()
    window.get_by_role("link", name="metrics").first.click()
    expect(window.get_by_text("score").first).to_be_visible()
    expect(window.get_by_text("7", exact=True).first).to_be_visible()

    shown = machine.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": ["report"]}}})
    window.goto(f"{machine.url}/artifacts/artifact/{shown[0]['id']}")
    with window.expect_popup() as opened:
        window.locator("a[href*='report.html']").first.click()
    expect(opened.value.locator("p")).to_have_text("report")
    opened.value.close()


def test_the_same_again_is_cached_and_seen_to_be(machine: Machine, window: Page, shots: Path | None) -> None:
    run = machine.start(profile="smoke", overrides=["last.times=8", "slow.seconds=3"])
    window.goto(f"{machine.url}/runs/flow-run/{run}")
    expect(window.locator(".state-badge", has_text="Completed").first).to_be_visible(timeout=300_000)
    states = machine.tasks(run)
    assert states["prepare"] == states["stubborn"] == "Restored" and states["slow"] == states["last"] == "Completed", states
    window.get_by_role("tab", name="Task Runs").or_(window.get_by_text("Task Runs", exact=True)).first.click()
    for state in ("Restored", "Completed"):
        expect(window.locator(".state-badge", has_text=state).last).to_be_visible()
    window.get_by_title("Recenter graph").click()
    time.sleep(2)  # it moves there
    photograph(window, shots, "run")


def test_the_form_checks_what_it_is_given(machine: Machine, window: Page) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        machine.start(at_once=99)
    assert refused.value.code == 409 and "greater than the maximum of 16" in refused.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        machine.start(overrides=["no value"])
    assert refused.value.code == 409
    form(machine, window)
    amount = window.locator("input[type=number]").first
    amount.fill("99")
    count = len(machine.call("/flow_runs/filter", {}))
    window.get_by_role("button", name="Submit").click()
    expect(window.get_by_text(re.compile("16")).first).to_be_visible()
    assert len(machine.call("/flow_runs/filter", {})) == count and window.url.count("/run")


@pytest.mark.parametrize("deployment", ["pipeline", "nightly", "evaluate"])
def test_each_form_as_a_person_sees_it(machine: Machine, window: Page, shots: Path | None, deployment: str) -> None:
    form(machine, window, deployment)
    photograph(window, shots, f"form-{deployment}")
    assert window.locator("a[href^='mailto:']").count() == 0
    if deployment == "pipeline":
        choose(window, "the beginning", "slow")
        choose(window, "the end", "last")
    if deployment == "nightly":  # descriptions are drawn a moment after their fields
        for words in ("Of the night, such as 2026-01-31", "Train everything anew"):
            expect(window.get_by_text(words).first).to_be_visible()
    if deployment == "evaluate":
        choose(window, "stage2", "stubborn")  # the default, which this project lacks, and one that it has


def test_a_value_that_only_the_project_can_refuse(machine: Machine, window: Page) -> None:
    """The first step of the flow asks `cf validate`, and its sentence is what the run says."""
    run = machine.start(overrides=["seed=-1"])
    assert machine.finish(run) == "Failed"
    assert "seed is -1; it must be 0 or more" in machine.run(run)["state"]["message"]
    assert machine.tasks(run) == {}
    window.goto(f"{machine.url}/runs/flow-run/{run}")
    expect(window.get_by_text("seed is -1; it must be 0 or more").first).to_be_visible()


def test_cancelled_in_the_ui_all_of_it_is_dead_within_ten_seconds(machine: Machine, window: Page) -> None:
    """Also a child with a session of its own that ignores SIGTERM."""
    run = machine.start(overrides=["slow.seconds=300", "stubborn.seconds=300"])
    before = machine.begun(run)
    engine = machine.engine(run)
    sessions = {process.pid for process in before if process.pid != engine.pid}
    assert len(sessions) >= 5  # DVC twice, two stages, the child
    window.goto(f"{machine.url}/runs/flow-run/{run}")
    window.get_by_role("button", name="Cancel", exact=True).click()
    expect(window.get_by_role("button", name="Confirm")).to_be_visible()
    began = time.monotonic()
    window.get_by_role("button", name="Confirm").click()
    until(lambda: not machine.living(run), f"all of it is dead: {machine.living(run)}", 10)
    print(f"dead {time.monotonic() - began:.1f} s after the click")
    until(lambda: machine.state(run) == "Cancelled", "the run says Cancelled")
    assert not {"Running", "Pending", "NotReady"} & set(machine.tasks(run).values())
    expect(window.locator(".state-badge", has_text="Cancelled").first).to_be_visible()


def test_nothing_was_asked_of_any_other_host(window: Page, hosts: set[str]) -> None:
    assert hosts - {""} == {"127.0.0.1"}  # data: has no host


def photograph(page: Page, shots: Path | None, name: str) -> None:
    if shots:
        page.screenshot(path=shots / f"{name}.png")
