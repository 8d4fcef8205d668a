"""`dvc plots diff` opened in a browser that has no network: docs/operating.md says that it needs none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.flows import project
from tests.system.driver import ROOT, chromium

PLOTS = """plots:
  - Loss: {template: curve, x: step, y: {curve.csv: loss}}
  - Systems: {template: systems, x: second, y: {systems.csv: mean}}
  - Rules: {template: rules, x: low, y: {rules.csv: clips}}
  - Plane: {template: plane, x: drift, y: {plane.csv: forgetting}}
"""
COLOURS = """canvas => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
  for (let at = 0; at < pixels.length; at += 4) seen.add(pixels.slice(at, at + 3).join());
  return seen.size;
}"""


def test_the_page_of_dvc_plots_opens_without_a_network(tmp_path: Path) -> None:
    project.git(tmp_path, "init", "-q")
    project.dvc(tmp_path, "init", "-q")
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    shutil.copytree(ROOT / ".dvc/plots", tmp_path / ".dvc/plots", dirs_exist_ok=True)
    (tmp_path / "dvc.yaml").write_text(PLOTS)
    for times in (1, 2):
        (tmp_path / "curve.csv").write_text("step,loss\n" + "".join(f"{step},{times / (1 + step)}\n" for step in range(9)))
        rows = [f"{second},prompts,{system},motion,{times * second},1,3\n" for system in ("stage1", "stage2") for second in (2, 4, 6)]
        (tmp_path / "systems.csv").write_text("second,suite,system,metric,mean,low,high\n" + "".join(rows))
        bins = [f"{rule},{low},{low + 1},{times * low},2\n" for rule in ("frozen", "border") for low in range(4)]
        (tmp_path / "rules.csv").write_text("rule,low,high,clips,threshold\n" + "".join(bins))
        points = [f"prompts,{system},{times * place},{3 - place}\n" for place, system in enumerate(("stage1", "stage2"))]
        (tmp_path / "plane.csv").write_text("suite,system,drift,forgetting\n" + "".join(points))
        if times == 1:
            project.git(tmp_path, "add", "-A")
            project.git(tmp_path, "commit", "-qm", "before")
    page_file = project.dvc(tmp_path, "plots", "diff", "HEAD").strip().splitlines()[-1]
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_context(offline=True).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file)
        page.wait_for_selector("canvas", timeout=30_000)
        page.wait_for_timeout(500)
        if folder := os.environ.get("CF_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/plots.png", full_page=True)
        colours = [canvas.evaluate(COLOURS) for canvas in page.query_selector_all("canvas")]
        browser.close()
    assert len(colours) == 4 and min(colours) > 4, f"{colours} colours of the four plots: a white page"
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
