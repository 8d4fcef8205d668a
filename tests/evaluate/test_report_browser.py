"""The report in a real browser without a network: videos in step, sorted tables, nothing wider than the window, markup as text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any, cast

import pytest
from evaluate.project import EVIL, make_params, write_project

from tasks.report import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="the report is opened by playwright: pip install playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="the report is opened in Chromium: apt-get install chromium")]
WIDER = """width => [...document.querySelectorAll("body *")].filter(e => {
  if (e.parentElement.closest(".scroll, pre, nav, svg")) return false;
  const box = e.getBoundingClientRect();
  return box.width && (box.right > width + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""
TIMES = "row => [...row.querySelectorAll('video')].map(v => v.currentTime)"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of a made-up project, all that it asked for, and all that went wrong in it."""
    paths = write_project(tmp_path_factory.mktemp("project"), make_params(), prompts=4)
    run(make_params(), cast(Any, None), **paths)
    asked, wrong = list[str](), list[str]()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.path.realpath(cast(str, CHROMIUM)), args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto((paths["out"] / "report.html").as_uri())
        yield page, asked, wrong
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(opened: tuple[Any, list[str], list[str]], width: int) -> None:
    page = opened[0]
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDER, width) == []


def test_videos_of_a_row_move_in_step(opened: tuple[Any, list[str], list[str]]) -> None:
    page = opened[0]
    row = page.query_selector("#prompts-0")
    row.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('#prompts-0 video')].every(v => v.readyState >= 2)")
    row.query_selector(".play").click()
    page.wait_for_function("[...document.querySelectorAll('#prompts-0 video')].every(v => v.currentTime > 0.3)")
    row.query_selector(".play").click()
    times = row.evaluate(TIMES)
    assert len(times) == 5 and max(times) - min(times) < 1
    bar = row.query_selector("input[type=range]")
    bar.evaluate("bar => { bar.value = 0.6; bar.dispatchEvent(new Event('input')); }")
    times = row.evaluate(TIMES)
    assert max(times) - min(times) < 0.001 and abs(times[0] - 0.6 * 81 / 16) < 0.1


def test_the_memory_of_the_seen_chunk_is_shown(opened: tuple[Any, list[str], list[str]]) -> None:
    page = opened[0]
    row, words = "#prompts-0", "[...document.querySelectorAll('#prompts-0 .chunk')].at(-1).textContent"
    said = []
    for place in (0.0, 0.9):
        page.eval_on_selector(f"{row} input[type=range]", f"bar => {{ bar.value = {place}; bar.dispatchEvent(new Event('input')); }}")
        page.wait_for_function(f"{words}.startsWith('chunk {1 if place == 0 else 7} of 7')")
        said.append(page.evaluate(words))
    assert said[0] == "chunk 1 of 7: latents 0–2; sink 0–2, slow –, fast –"
    assert said[1] == "chunk 7 of 7: latents 18–20; sink 0–2, slow 6 12, fast 15–17"
    colours = page.eval_on_selector_all(f"{row} canvas", "all => all.map(c => c.toDataURL().length)")
    assert len(colours) == 2 and min(colours) > 200


def test_tables_sort_by_their_numbers(opened: tuple[Any, list[str], list[str]]) -> None:
    page = opened[0]
    column = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(r => Number(r.cells[1].dataset.sort))"
    head = page.query_selector("table.sortable th.sort:nth-child(2)")
    head.click()
    up = page.evaluate(column)
    head.press("Enter")
    down = page.evaluate(column)
    assert up == sorted(up) and down == up[::-1] and len(set(up)) > 2
    assert head.get_attribute("aria-sort") == "descending"


def test_a_failure_leads_into_its_video(opened: tuple[Any, list[str], list[str]]) -> None:
    page = opened[0]
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    link = page.query_selector("a.moment[data-file^=prompts]")
    link.click()
    file = link.get_attribute("data-file")
    assert page.evaluate(f"document.querySelector('figure[data-file=\"{file}\"] video').currentTime") == pytest.approx(3.25, abs=0.01)
    assert page.evaluate("location.hash").startswith("#prompts-")


def test_prompts_are_text_and_no_network_is_asked(opened: tuple[Any, list[str], list[str]]) -> None:
    page, asked, wrong = opened
    assert page.evaluate("[...document.querySelectorAll('h3 q')].map(q => q.textContent)").count(EVIL) >= 1
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert wrong == []
