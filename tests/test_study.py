"""The study: its plan, the parameters of its arms, its pipeline, and `make study`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study import cells, forecast, nodes, run
from study.plan import Plan, read_plan
from tasks.params.load import validate_params
from tasks.params.yaml_file import Refused, read_yaml
from tests.study_cells import write_made_up

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan()


def refusal(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    tree = json.loads(json.dumps(read_yaml(ROOT / "study/plan.yaml")))
    change(tree)
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(tree))
    with pytest.raises(Refused) as caught:
        read_plan(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("gate"), "gate is missing"),
        (lambda t: t["arms"]["cdmd"].update(techer="context"), "arms.cdmd.techer is not a parameter; did you mean"),
        (lambda t: t["arms"]["cdmd"].update(teacher="best"), "arms.cdmd names the teacher best, which is not among context"),
        (lambda t: t["arms"]["cdmd"].update(weights="stage1"), "states one of them, because it has one student"),
        (lambda t: t["arms"]["stage1"].update(updates=5), "updates is stated, but only student: stage2 is trained"),
        (lambda t: t["arms"]["cdmd_absolute"].update(weights="teacher"), "weights is teacher, which trains no student"),
        (lambda t: t["groups"]["pan"].update(world="moon"), "groups.pan names the world moon"),
        (lambda t: t["groups"]["pan"].update(world="orbit"), "has the cell orbit-1-teacher twice"),
        (lambda t: t["groups"]["pilot"].update(seeds=[3], arms=["cdmd_50"]), "trains seed 3 of orbit both counted and not"),
        (lambda t: t["worlds"]["pan"].update(reporting=7102), "worlds.pan.reporting is 7102, as worlds.orbit.validation is"),
        (lambda t: t["contrasts"][0].update(arms=["cdmd"]), "test superior compares 2 arms"),
        (lambda t: t["contrasts"][0].update(beside="drift"), "test superior has no use for it"),
        (lambda t: t["contrasts"][0].update(metric="speed"), "tests speed, which has no better side"),
        (lambda t: t["contrasts"][0].update(world="pan", arms=["cdmd", "no_erft"]), "compares no_erft in pan, but no counted group"),
        (lambda t: t["contrasts"][0].update(name="erft"), "contrasts has erft twice"),
        (lambda t: t["curves"][1].update(x=[0]), "has 4 arms, but x of 'Frames of the slow part' 1 values"),
        (lambda t: t.update(level=1.5), "level is 1.5; it must be less than 1"),
    ],
)
def test_a_bad_plan_is_refused_in_one_sentence(tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    assert says in refusal(tmp_path, change)


def test_every_arm_is_a_valid_set_of_parameters(plan: Plan) -> None:
    """Of one seed in each world, because seeds change nothing that a rule reads; with those of clips, teachers and inits."""
    seen = set()
    for name, tree in nodes.list_nodes(plan):
        kind = re.sub(r"-\d+", "", name, count=1)
        if kind not in seen:
            seen.add(kind)
            validate_params(tree, Path(name))
    assert {f"orbit-{arm}" for arm in plan.arms} <= seen and {
        "orbit",
        "orbit-reporting",
        "orbit-teacher_slow_0",
        "orbit-init_blind",
    } <= seen


def test_arms_differ_from_the_profile_in_what_they_state(plan: Plan) -> None:
    plain = nodes.build_params(plan, "pan", 1)
    profile = nodes.read_profile("tiny")
    assert plain["seed"] == 1 and plain["stage2"] == profile["stage2"] and plain["base"] == profile["base"]
    assert plain["clips"] == profile["clips"]
    context, memoryless = (nodes.build_params(plan, "pan", 1, arm=arm) for arm in ("cdmd", "memoryless"))
    assert memoryless["stage2"]["teacher"].pop("context") == "none" != context["stage2"]["teacher"].pop("context")
    assert context == memoryless
    orbit = nodes.build_params(plan, "orbit", 1, arm="slow_3")
    assert orbit["clips"]["worlds"]["path"] == "orbit" and orbit["stage2"]["memory"]["sink"] == orbit["teacher"]["view"]["sink"] == 1
    assert orbit["stage2"]["memory"]["slow"] == orbit["teacher"]["view"]["slow"] == 3


def test_both_arms_of_a_contrast_take_equal_optimiser_steps(plan: Plan) -> None:
    for contrast in plan.contrasts:
        trained = [arm for arm in contrast.arms if plan.trained_arm(arm).student == "stage2"]
        specs = [nodes.build_params(plan, contrast.world, 1, arm=arm)["stage2"] for arm in trained]
        assert len({(one["steps"], one["critic_updates"], one["critic_warmup"], one["batch"]) for one in specs}) == 1, contrast.name


@pytest.mark.parametrize("updates", [50, 600])
def test_updates_are_the_students(plan: Plan, updates: int) -> None:
    tree = nodes.build_params(plan, "orbit", 1, arm=f"cdmd_{updates}")
    assert validate_params(tree, Path("params.yaml")).stage2.student_updates == updates


def test_reported_worlds_are_those_of_no_training_and_no_choice(plan: Plan) -> None:
    trees = {use: nodes.build_clip_params(plan, "orbit", use) for use in ("validation", "reporting")}
    seeds = {nodes.build_params(plan, "orbit")["seed"], *(tree["seed"] for tree in trees.values())}
    assert len(seeds) == 3 and all(tree["filter"]["heldout"] >= plan.reported for tree in trees.values())


def test_what_an_arm_generates_with_is_its_own(plan: Plan) -> None:
    assert nodes.build_params(plan, "orbit", 1, arm="cdmd")["generate"]["systems"]["student"]["memory"] is None, "as trained"
    swapped = nodes.build_params(plan, "orbit", 1, arm="cdmd_absolute")["generate"]["continuations"]["student"]["memory"]
    assert swapped["positions"] == "absolute" and swapped["sink"] == 1
    teacher = nodes.build_params(plan, "orbit", 1, arm="teacher")["generate"]
    assert teacher["systems"] == {} and [*teacher["continuations"]] == ["teacher", "teacher_none"]
    assert next(cell for cell in plan.cells if cell.arm == "teacher").counted is False, "the pilot comes first"


def test_base_teacher_and_init_are_shared_by_the_arms_of_a_seed(plan: Plan) -> None:
    own = {cell.arm: nodes.locate_weights(plan, cell) for cell in plan.cells if (cell.world, cell.seed) == ("orbit", 1)}
    cdmd, other = own["cdmd"], own["memoryless"]
    assert all(cdmd[stage] == other[stage] for stage in ("base", "teacher", "causal_init", "stage1")) and cdmd["stage2"] != other["stage2"]
    assert own["memoryless_base"]["scores"] == cdmd["base"] and cdmd["scores"] == cdmd["teacher"]
    assert own["cdmd_absolute"]["stage2"] == cdmd["stage2"], "the same weights, run otherwise"
    assert own["no_erft"]["teacher"] != cdmd["teacher"] and own["no_erft"]["stage1"] == cdmd["stage1"]
    assert own["blind_cdmd"]["stage1"] != cdmd["stage1"] and own["blind_cdmd"]["teacher"] == cdmd["teacher"]


# --------------------------------------------------------------------------------------------------------- pipeline


@pytest.mark.parametrize("stage", ["base", "teacher", "causal_init", "stage1", "stage2", "cell"])
def test_a_node_depends_on_what_its_stage_reads(stage: str) -> None:
    own, theirs = read_yaml(ROOT / "study/dvc.yaml")["stages"], read_yaml(ROOT / "dvc.yaml")["stages"]
    entry = own[stage].get("do", own[stage])
    stages = ("generate", "evaluate") if stage == "cell" else (stage,)
    wanted = {key for one in stages for key in theirs[one]["params"] if not key.startswith("samples")}
    listed = next(iter(entry["params"][0].values()))
    assert set(listed) == wanted and entry["params"][1] == {"params/code.json": [*stages]}


STUB = """
import sys
from pathlib import Path

_, profile, verb, stage, name, *paths = sys.argv[1:]
assert (profile, verb) == ("tiny", "node")
made = {"clips": [f"made/tiny/{name}/{use}" for use in ("training", "validation", "reporting")], "cell": [f"cells/tiny/{name}.jsonl"]}
for path in made.get(stage, paths[:1]):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(stage)
"""


def lay_out(folder: Path, stub: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a study's DVC project, whose nodes are the stub; return its folder."""
    study = folder / "study"
    study.mkdir()
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / "study" / name, study)
    shutil.copytree(ROOT / "study/.dvc", study / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    (folder / "stub/study").mkdir(parents=True)
    (folder / "stub/study/__main__.py").write_text(stub)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    monkeypatch.setattr(nodes, "PARAMS", study / "params")
    return study


def choose_cells(plan: Plan, **main: Any) -> Plan:
    return plan.model_copy(update={"groups": {"main": plan.groups["main"].model_copy(update=main)}})


def test_dvc_makes_a_cell_from_its_shared_models(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By DVC itself, with a stub in the place of the stages: what a cell needs, once, in running order; then only what is missing."""
    study = lay_out(tmp_path, STUB, monkeypatch)
    few = choose_cells(plan, seeds=[1], arms=["memoryless", "cdmd"])
    nodes.write_nodes(few)

    def reproduce(target: str) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
        done = subprocess.run(["dvc", "repro", target], cwd=study, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return re.findall(r"Running stage '([^']+)'", done.stdout)

    shared = ["clips@tiny-orbit", "base@tiny-orbit-1", "teacher@tiny-orbit-1-context", "causal_init@tiny-orbit-1-usual"]
    ran = reproduce("cell@tiny-orbit-1-cdmd")
    assert sorted(ran) == sorted([*shared, "stage1@tiny-orbit-1-usual", "stage2@tiny-orbit-1-cdmd", ran[-1]])
    assert ran[-1] == "cell@tiny-orbit-1-cdmd" and (study / "cells/tiny/orbit-1-cdmd.jsonl").exists()
    before = {file: file.stat().st_mtime_ns for file in (study / "params").rglob("*.json")}
    nodes.write_nodes(few)
    assert {file: file.stat().st_mtime_ns for file in (study / "params").rglob("*.json")} == before, "unchanged files are left alone"
    assert reproduce("cell@tiny-orbit-1-memoryless") == ["stage2@tiny-orbit-1-memoryless", "cell@tiny-orbit-1-memoryless"]


@pytest.mark.parametrize("arm", ["teacher", "stage1", "cdmd", "memoryless_base"])
def test_what_a_cell_is_made_from_is_what_dvc_says(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    study = lay_out(tmp_path, STUB, monkeypatch)
    nodes.write_nodes(few := choose_cells(plan, seeds=[1], arms=[arm]))
    [cell] = few.cells
    said = subprocess.run(["dvc", "dag", "--dot", f"cell@tiny-{cell.name}"], cwd=study, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r'"(\w+@[\w-]+)"', said)) == {"clips@tiny-orbit", *nodes.list_targets(few, cell)}


def test_two_seeds_are_trained_side_by_side(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is still training, and reads the world's clips, while DVC looks for what the other one needs."""
    study = lay_out(tmp_path, "import time\n" + STUB + "time.sleep(0 if stage == 'clips' else 1.5)\n", monkeypatch)
    for name, value in (("STUDY", study), ("ROOT", tmp_path / "stub")):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(cells, "CELLS", study / "cells")
    monkeypatch.setattr(run, "is_made", lambda plan, cell: False)  # by another's parameters: the stub writes no key
    run.make_cells(choose_cells(plan, seeds=[1, 2], arms=["teacher"]), jobs=2)
    assert sorted(file.name for file in (study / "cells/tiny").iterdir()) == ["orbit-1-teacher.jsonl", "orbit-2-teacher.jsonl"]


def test_a_training_gets_the_models_before_it(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, dict[str, Path]]] = []
    monkeypatch.setattr(nodes, "run_stage", lambda folder, stage, **paths: ran.append((stage, paths)))
    monkeypatch.setattr(nodes, "open_folder", lambda plan, name: tmp_path / name)
    made = nodes.MADE / "tiny/orbit/1"
    nodes.train_model(plan, "base", "orbit-1", made / "base")
    nodes.train_model(plan, "stage1", "orbit-1-init_blind", made / "stage1-blind")
    nodes.train_model(plan, "stage2", "orbit-1-memoryless_base", made / "memoryless_base", made / "stage1-usual", made / "base")
    (_, base), (_, stage1), (_, stage2) = ran
    assert set(base) == {"latents", "codec", "out"}
    assert stage1["causal_init"] == made / "causal_init-blind" and stage1["base"] == made / "base"
    assert (stage2["student"], stage2["teacher"]) == (made / "stage1-usual", made / "base")
    assert stage2["latents"] == nodes.MADE / "tiny/orbit/training/latents"


# ------------------------------------------------------------------------------------------------------- make study


def test_the_forecast_counts_shared_models_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CELLS", tmp_path)
    one, two = ([cell for cell in plan.cells if cell.counted and (cell.world, cell.seed) == ("orbit", 1) and cell.arm in arms]
                for arms in (("cdmd",), ("cdmd", "memoryless")))  # fmt: skip
    alone, both = (forecast.estimate_seconds(plan, some) for some in (one, two))
    committed = json.loads((ROOT / "benchmarks/results/tiny-runtime.json").read_text())
    more = sum(both.values()) - sum(alone.values())
    assert committed["stage2"]["wall_seconds"] < more < sum(committed[s]["wall_seconds"] for s in ("stage2", "generate", "evaluate")) + 30
    longer = forecast.estimate_seconds(plan, [cell for cell in plan.cells if cell.name == "orbit-1-cdmd_600"])
    assert sum(longer.values()) > sum(alone.values()) + committed["stage2"]["wall_seconds"], "600 updates take longer"
    text = forecast.describe_hours(plan, forecast.list_missing(plan))
    assert f"0 of {len(plan.cells)} cells are there" in text and "h with two seeds at once" in text


def test_a_second_call_makes_only_what_is_missing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CELLS", tmp_path)
    monkeypatch.setattr(run, "write_nodes", lambda plan: None)
    asked: list[str] = []
    monkeypatch.setattr(run, "reproduce", lambda *targets: asked.append(targets[-1]))
    write_made_up(plan, tmp_path, lambda arm, seed: 40.0, arms={"teacher", "cdmd"}, seeds={1, 2, 3})
    run.make_cells(plan, jobs=2, groups=["main"])
    assert asked[0] == "clips@tiny-orbit" and len(asked) == 1 + 48 - 6
    assert "cell@tiny-orbit-1-cdmd" not in asked and "cell@tiny-orbit-4-cdmd" in asked
    first = tmp_path / "tiny/orbit-1-cdmd.jsonl"
    first.write_text(first.read_text().replace('"key": "', '"key": "another'))
    assert [cell.name for cell in forecast.list_missing(plan, ["main"])][1:3] != [] and not forecast.is_made(plan, next(
        cell for cell in plan.cells if cell.name == "orbit-1-cdmd")), "made with other parameters"  # fmt: skip
    with pytest.raises(Refused, match="the plan has no group best; its groups are pilot, main"):
        run.make_cells(plan, jobs=1, groups=["best"])


def test_what_fails_stops_its_seed_alone_and_is_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CELLS", tmp_path)
    monkeypatch.setattr(run, "write_nodes", lambda plan: None)
    asked: list[str] = []

    def reproduce(*targets: str) -> None:
        asked.append(target := targets[-1])
        if target == "cell@tiny-pan-2-stage1":
            raise Refused(f"{target} failed")

    monkeypatch.setattr(run, "reproduce", reproduce)
    with pytest.raises(Refused, match="1 of 20 cells failed, the first pan-2-stage1"):
        run.make_cells(plan, jobs=1, groups=["pan"])
    assert "cell@tiny-pan-2-cdmd" not in asked and {"cell@tiny-pan-1-cdmd", "cell@tiny-pan-3-cdmd", "cell@tiny-pan-5-memoryless"} <= set(
        asked
    )


@pytest.mark.parametrize(("arm", "needed"), [("teacher", "teacher"), ("stage1", "stage1"), ("cdmd", "stage2"), ("cdmd_60s", "stage2")])
def test_a_cell_waits_for_no_model_that_it_does_not_generate_with(plan: Plan, arm: str, needed: str) -> None:
    """`generate` refuses a path that is not there, and a teacher's cell is made before any student."""
    cell = next(cell for cell in plan.cells if cell.arm == arm)
    given, located = cells.choose_weights(plan, cell), nodes.locate_weights(plan, cell)
    assert {name for name, path in given.items() if path != located["base"]} == {needed}
    assert given[needed] == located[needed]
    assert set(given) == {"base", "teacher", "causal_init", "stage1", "stage2"}


def test_a_cell_is_what_the_stages_measured(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = next(cell for cell in plan.cells if cell.name == "orbit-2-cdmd")
    folder = tmp_path / "tiny" / cell.name
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(json.dumps(nodes.build_params(plan, "orbit", 2, arm="cdmd")))

    def run_stage(folder: Path, stage: str, **paths: Path) -> None:
        paths["out"].mkdir()
        if stage == "evaluate":
            keys = {"suite": "continuations", "system": "student", "prompt": "p", "seed": 0, "file": "f"}
            rows = [
                keys | {"clip": f"c{n}", "metric": name, "value": v}
                for n, v in enumerate((10.0, 30.0))
                for name in ("map_error_absent", "jitter")
            ]
            (paths["out"] / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            points = [f"prompts,student,sky_error,{second},{second / 2},0,9" for second in range(6)]
            (paths["out"] / "curves.csv").write_text("suite,system,metric,second,mean,low,high\n" + "\n".join(points) + "\n")
            for name, values in (
                ("metrics", {"continuations": {"student": {"diversity": 70.0}}}),
                ("runtime", {"wall_seconds": 9.0, "cpu": "x"}),
            ):
                (folder / name).mkdir()
                (folder / name / "evaluate.json").write_text(json.dumps(values))

    for name, value in (
        ("run_stage", run_stage),
        ("open_folder", lambda plan, name: folder),
        ("CELLS", tmp_path / "cells"),
        ("WORK", tmp_path),
    ):
        monkeypatch.setattr(cells, name, value)
    cells.measure_cell(plan, cell)
    (read,) = cells.read_cells(tmp_path / "cells/tiny")
    assert read.cell == cell and read.about["key"] == nodes.compute_cell_key(plan, cell)
    assert (read.about["seconds"], read.about["machine"]["cpu"]) == ({"evaluate": 9.0}, "x")
    assert read.about["updates"] > 0 and read.about["tflop"] > 0
    assert read.find_metric("continuations", "map_error_absent") == {
        "kind": "metric", "suite": "continuations", "system": "student", "metric": "map_error_absent", "mean": 20.0,
        "clips": {"c0": 10.0, "c1": 30.0},
    }  # fmt: skip
    diversity, drift = read.find_metric("continuations", "diversity"), read.find_metric("prompts", "drift")
    assert diversity and drift and (diversity["mean"], drift["mean"]) == (70.0, 2.0)
    assert read.find_metric("continuations", "jitter") is None, "not in the plan"
    assert not (folder / "samples").exists() and not (folder / "results").exists()


def test_what_changes_a_number_changes_the_key(plan: Plan) -> None:
    cell = next(cell for cell in plan.cells if cell.name == "orbit-1-cdmd")
    other = next(cell for cell in plan.cells if cell.name == "orbit-2-cdmd")
    assert nodes.compute_cell_key(plan, cell) != nodes.compute_cell_key(plan, other)
    changed = plan.model_copy(update={"shared": {"tiny": plan.shared["tiny"] | {"base": {"steps": 7}}}})
    assert nodes.compute_cell_key(changed, cell) != nodes.compute_cell_key(plan, cell)
    elsewhere = plan.model_copy(update={"shared": plan.shared | {"small": {"base": {"steps": 7}}}})
    assert nodes.compute_cell_key(elsewhere, cell) == nodes.compute_cell_key(plan, cell), "another profile's"
    watched = plan.model_copy(update={"shared": {"tiny": plan.shared["tiny"] | {"nightly": {"prompts": 1}}}})
    assert nodes.compute_cell_key(watched, cell) == nodes.compute_cell_key(plan, cell)
