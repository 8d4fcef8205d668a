"""What flows/project/dvc_graph.py reads from DVC's insides, against what DVC itself says of the same project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.project import dvc_graph, dvc_lock
from flows.project.dvc_graph import Stage, select_stages
from tasks.params.yaml_file import read_yaml
from tests.flows import project

ROOT = Path(__file__).parents[2]
GRAPH = """stages:
  filter:
    desc: >-
      two lines
      that are one
    cmd: cp -r raw kept
    deps: [raw]
    outs: [kept]
    meta: {cf: {gpus: all, retries: 2, timeout: 1.5}, other: {of: somebody}}
  evaluate:
    foreach: [short, long]
    do:
      cmd: echo ${item} > eval-${item}.txt
      deps: [kept]
      outs:
        - eval-${item}.txt
  bench:
    matrix: {model: [m1, m2], seconds: [5, 60]}
    cmd: echo ${item.model} > bench-${key}.txt
    deps: [kept]
    outs:
      - bench-${key}.txt
  report:
    cmd: cat eval-short.txt eval-long.txt bench-m1-5.txt > report.txt
    deps: [eval-short.txt, eval-long.txt, bench-m1-5.txt, sub/made.txt]
    outs: [report.txt]
  apart:
    cmd: echo 1 > apart.txt
    outs: [apart.txt]
    frozen: true
"""
NAMES = ["raw.dvc", "filter", "evaluate@short", "evaluate@long", *(f"bench@{m}-{s}" for m in ("m1", "m2") for s in (5, 60))]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("graph") / "project"
    (root / "raw").mkdir(parents=True)
    (root / "raw/a.txt").write_text("a")
    (root / "sub").mkdir()
    (root / "dvc.yaml").write_text(GRAPH)
    (root / "sub/dvc.yaml").write_text("stages:\n  made:\n    cmd: echo 1 > made.txt\n    outs: [made.txt]\n")
    project.git(root, "init", "-q")
    project.dvc(root, "init", "-q")
    project.dvc(root, "add", "-q", "raw")
    return root


def test_the_graph_is_dvcs(graph: Path) -> None:
    found = dvc_graph.read_graph(graph)
    listed = project.dvc(graph, "stage", "list", "--all", "--name-only").split()
    assert {stage.name for stage in found} == {*listed, "raw.dvc"} >= {*NAMES, "sub/dvc.yaml:made", "report", "apart"}
    drawn = project.dvc(graph, "dag", "--dot")
    edges = {(a.removeprefix("./"), b.removeprefix("./")) for a, b in re.findall(r'"([^"]+)" -> "([^"]+)"', drawn)}
    assert {(other, stage.name) for stage in found for other in stage.upstream} == edges
    assert len(edges) == 11


def test_what_comes_first_comes_first(graph: Path) -> None:
    before: set[str] = set()
    for stage in dvc_graph.read_graph(graph):
        assert set(stage.upstream) <= before
        before.add(stage.name)


def test_the_lock_is_put_in_dvcs_order(graph: Path) -> None:
    project.dvc(graph, "repro", "-q", "report")
    whole = (graph / "dvc.lock").read_text()
    names = dvc_lock.list_recorded((graph / "dvc.lock").read_text())
    assert "evaluate@short" in names and names == [stage.name for stage in dvc_graph.read_graph(graph) if stage.name in names]
    head, blocks = whole.split("  filter:\n")[0], {}
    for name in names:
        blocks[name] = re.split(r"\n  (?=\S)", whole[whole.index(f"  {name}:\n") :])[0].rstrip("\n") + "\n"
    mixed = head + "".join(blocks[name] for name in reversed(names))
    (graph / "dvc.lock").write_text(mixed)
    assert dvc_lock.list_recorded((graph / "dvc.lock").read_text()) == names[::-1]
    dvc_lock.sort_lock(graph, names[-1:], dvc_graph.read_graph(graph))
    assert dvc_lock.list_recorded((graph / "dvc.lock").read_text()) == [names[-1], *names[:-1]], "what was there before stays where it was"
    dvc_lock.sort_lock(graph, [], dvc_graph.read_graph(graph))
    assert (graph / "dvc.lock").read_text() == whole
    (graph / "dvc.lock").unlink()
    dvc_lock.sort_lock(graph, [], dvc_graph.read_graph(graph))


def test_what_a_stage_states(graph: Path) -> None:
    found = {stage.name: stage for stage in dvc_graph.read_graph(graph)}
    first = found["filter"]
    assert (first.desc, first.gpus, first.retries, first.timeout) == ("two lines that are one", "all", 2, 1.5)
    plain = found["evaluate@short"]
    assert (plain.desc, plain.gpus, plain.retries, plain.timeout, plain.frozen) == ("", 0, 0, None, False)
    assert found["apart"].frozen


def test_names_do_not_depend_on_where_the_process_is(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dvc_graph.read_graph(graph)
    monkeypatch.chdir(tmp_path)
    assert dvc_graph.read_graph(graph) == here


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ("gpu: 1", "meta.cf.gpu of filter in dvc.yaml is 1, which means nothing; known are gpus, retries, timeout"),
        ("retries: -1", "meta.cf.retries of filter in dvc.yaml is -1; gpus is a number or all"),
        ("gpus: some", "meta.cf.gpus of filter in dvc.yaml is 'some'"),
        ("timeout: true", "meta.cf.timeout of filter in dvc.yaml is True"),
    ],
)
def test_a_meta_that_means_nothing_is_refused(graph: Path, meta: str, said: str) -> None:
    file, before = graph / "dvc.yaml", (graph / "dvc.yaml").read_text()
    file.write_text(before.replace("gpus: all, retries: 2, timeout: 1.5", meta))
    try:
        with pytest.raises(ValueError, match=re.escape(said)):
            dvc_graph.read_graph(graph)
    finally:
        file.write_text(before)


def test_every_stage_of_the_graph_runs_by_its_name_and_is_then_unchanged(graph: Path) -> None:
    stages = dvc_graph.read_graph(graph)
    assert "raw.dvc" in dvc_graph.find_unchanged(graph, stages)
    (graph / "apart.txt").write_text("1\n")  # what a frozen stage has made: DVC doesn't run it
    for stage in stages:
        project.dvc(graph, "repro", "--single-item", stage.name)
    assert dvc_graph.find_unchanged(graph, stages) == {stage.name for stage in stages}
    (graph / "raw/b.txt").write_text("b")
    assert dvc_graph.find_unchanged(graph, stages) == {stage.name for stage in stages} - {"raw.dvc", "filter"}
    assert "bench@m1-5" in dvc_graph.find_unchanged(graph, stages), "it changes when filter has run: dvc status can't know, the flow must"


def test_a_chosen_part() -> None:
    known = [Stage("a"), Stage("b", ("a",)), Stage("e@x", ("b",)), Stage("e@y", ("b",)), Stage("c", ("a",)), Stage("d", ("e@x", "c"))]

    def names(*only: str, **ends: str) -> str:
        return " ".join(stage.name for stage in select_stages(known, only, **ends))

    assert names() == "a b e@x e@y c d"
    assert names("d", "a") == "a d"
    assert names("e") == "e@x e@y" and names("e@y") == "e@y"
    assert names(first="b") == "b e@x e@y d"
    assert names(last="c") == "a c"
    assert names(first="b", last="d") == "b e@x d"
    assert names("d", "c", first="b") == "d"


def test_a_stage_that_is_not_there_is_one_sentence() -> None:
    known = [Stage("stage1"), Stage("stage2", ("stage1",))]
    with pytest.raises(ValueError, match=r"^stge2 is no stage; did you mean stage2\? Known are stage1, stage2$"):
        select_stages(known, first="stge2")
    with pytest.raises(ValueError, match="nothing is left to run of stages stage1, from stage2, to the end"):
        select_stages(known, ["stage1"], first="stage2")


def test_every_stage_of_this_project_says_what_it_needs() -> None:
    stated = read_yaml(ROOT / "dvc.yaml")["stages"]
    for stage in dvc_graph.read_graph(ROOT):
        assert {"gpus", "retries"} <= set(stated[stage.name]["meta"]["cf"]), f"{stage.name} in dvc.yaml states no meta.cf.gpus or retries"
        assert stage.timeout is None or not stage.retries, f"{stage.name}: training takes as long as it takes"
