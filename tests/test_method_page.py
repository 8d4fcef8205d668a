"""docs/method.md and docs/performance.md name functions that exist, under the files that they link."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("docs/method.md", "docs/performance.md")
LINK = re.compile(r"\[(?P<file>[\w/]+\.py):`(?P<name>[\w.]+)`\]\((?P<target>[^)]+)\)")
MARKDOWN_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def links() -> list[tuple[str, str, str, str]]:
    """Page, file, name and target of every link to a function."""
    return sorted({(page, m["file"], m["name"], m["target"]) for page in PAGES for m in LINK.finditer((ROOT / page).read_text())})


def definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """Dotted names of the functions and classes of a module, and of classes' methods."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= definitions(node, f"{prefix}{node.name}.")
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_a_page_links_is_defined_there(page: str) -> None:
    found = [link for link in links() if link[0] == page]
    assert found, "the page has no link of the form [file.py:`function`](path)"
    for _, file, name, target in found:
        path = (ROOT / page).parent / target
        assert path.is_file(), f"{page} links {target}, which does not exist"
        assert path.name == Path(file).name, f"{page} names {file}, but links {target}"
        assert name in definitions(ast.parse(path.read_text())), f"{page} links {name}, which {target} does not define"


@pytest.mark.parametrize("page", PAGES)
def test_every_other_link_of_a_page_leads_to_a_file(page: str) -> None:
    for target in MARKDOWN_LINK.findall((ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page} links {target}, which does not exist"


def test_every_equation_of_the_paper_has_a_function() -> None:
    table = (ROOT / "docs/method.md").read_text().split("## Equations")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    stated = " ".join(row.split("|")[1] for row in rows)
    numbers = {int(number) for number in re.findall(r"\d", " ".join(re.findall(r"eqs?\. [\d, ]+", stated)))}
    assert numbers >= set(range(2, 9)), "eqs. 2 to 8; eq. 1 is the objective that eq. 2 splits"


def test_sections_that_the_code_cites_exist() -> None:
    for page in PAGES:
        headings = set(re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE))
        for folder in ("cf_model", "tasks", "flows", "tests"):
            for file in (ROOT / folder).rglob("*.py"):
                for cited in re.findall(rf'{re.escape(page)}, "([^"]+)"', file.read_text()) if file.name != Path(__file__).name else ():
                    assert cited in headings, f"{file} cites {page}, {cited!r}"
