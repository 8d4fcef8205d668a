"""What study/dvc.yaml runs: the parameters of every node, and the nodes with the commands of the pipeline's own stages.

A node is one training or one measurement: `orbit` (the clips of a world set), `orbit-1` (its base model with seed 1),
`orbit-1-teacher_context` (a teacher), `orbit-1-init_usual` (causal init and stage 1), `orbit-1-cdmd` (a student, and its cell). Base,
teacher and init are shared by all arms of a seed. A node's parameters are a complete params.yaml in study/params/<profile>.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from study.plan import Cell, Plan
from tasks.commands.control import run_stage
from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.params.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "study"
PARAMS, MADE, WORK = STUDY / "params", STUDY / "made", STUDY / "work"
SPARE = 16  # clips of a reported set beyond those that are needed, because the filter may find two too much alike
TRAINED = ("base", "teacher", "causal_init", "stage1", "stage2")
NOT_IN_KEY = ("tracking", "engine", "nightly", "samples", "watch", "profile", "start")  # sections that change no number of a cell


@cache
def read_profile(name: str) -> dict[str, Any]:
    """Read a profile once; a copy is what nodes change."""
    return read_yaml(ROOT / f"profiles/{name}.yaml")


def lay_over(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Write what a change states into a tree of parameters, section by section."""
    for name, value in change.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            lay_over(tree[name], value)
        else:
            tree[name] = value


def build_params(
    plan: Plan, world: str, seed: int | None = None, *, teacher: str = "context", init: str = "usual", arm: str | None = None
) -> dict[str, Any]:
    """Build a node's parameters: the profile, and over it what the plan changes, from the most general to the arm's own.

    Without a seed it is that of the world's training clips. `arm` overrules `teacher` and `init` by its own.
    """
    about = plan.trained_arm(arm) if arm else None
    if about:
        teacher, init = about.teacher, about.init
    tree = json.loads(json.dumps(read_profile(plan.profile)))  # not a deep copy: sections that YAML aliases to one another must part
    changes = [plan.shared.get(plan.profile, {}), plan.worlds[world].params, plan.teachers[teacher], plan.inits[init]]
    changes += [about.params] if about else []
    for change in changes:
        lay_over(tree, change)
    tree["seed"] = plan.worlds[world].training if seed is None else seed
    tree["tracking"]["wandb"] = "off"
    for stage in TRAINED:
        tree["samples"][stage]["every"] = 0
    if about and about.updates:
        spec = tree["stage2"]
        spec["steps"] = spec["critic_warmup"] + about.updates * spec["critic_updates"]
    if arm:
        tree["generate"] |= state_systems(plan, tree, arm)
    return tree


def state_systems(plan: Plan, tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what `generate` makes for a cell: the student's videos in both suites, or the teacher's with and without its context."""
    arm, student = plan.arms[name], plan.trained_arm(name).student
    frames = arm.frames or plan.frames
    if student == "teacher":
        view = tree["teacher"]["view"]
        nothing = dict(view, context="none", sink=0, slow=0, fast=0, stride=1)
        views = {"teacher": None, "teacher_none": nothing}
        teachers = {system: {"weights": "teacher", "memory": None, "view": seen, "frames": frames} for system, seen in views.items()}
        return {"systems": {}, "continuations": teachers, "continued": plan.reported}
    assert student
    memory = tree[student]["memory"] | arm.memory if arm.memory else None
    one = {"student": {"weights": student, "memory": memory, "view": None, "frames": frames}}
    return {"systems": one, "continuations": one, "continued": plan.reported, "continued_beside": plan.reported}


def build_clip_params(plan: Plan, world: str, use: str) -> dict[str, Any]:
    """Build the parameters of a world's validation or reporting clips, all of which are held out."""
    tree = build_params(plan, world)
    tree["seed"] = getattr(plan.worlds[world], use)
    tree["clips"] |= {"count": plan.reported + SPARE, "bad": 0}
    tree["filter"]["heldout"] = plan.reported
    tree["generate"] |= {"continued": plan.reported, "prompts": min(plan.reported, tree["generate"]["prompts"])}
    return tree


def locate_weights(plan: Plan, cell: Cell) -> dict[str, Path]:
    """Return where the weights are that a cell needs, by the options of the stages; `scores` are those that stage 2 is scored by."""
    about, folder = plan.trained_arm(cell.arm), MADE / plan.profile / cell.world / str(cell.seed)
    own = plan.arms[cell.arm].weights or cell.arm
    paths = {"base": folder / "base", "teacher": folder / f"teacher-{about.teacher}"}
    paths |= {stage: folder / f"{stage}-{about.init}" for stage in ("causal_init", "stage1")}
    paths |= {"stage2": folder / own if about.student == "stage2" else paths["stage1"]}
    return paths | {"scores": paths["base"] if about.scores == "base" else paths["teacher"]}


def list_targets(plan: Plan, cell: Cell) -> list[str]:
    """Return the trainings that a cell needs and the cell, in running order, as study/dvc.yaml names them; the world's clips are there."""
    about, seed = plan.trained_arm(cell.arm), f"{plan.profile}-{cell.world}-{cell.seed}"
    teacher, init = [f"teacher@{seed}-{about.teacher}"], [f"{stage}@{seed}-{about.init}" for stage in ("causal_init", "stage1")]
    scores = [] if about.scores == "base" else teacher
    student = [*scores, *init, f"stage2@{seed}-{plan.arms[cell.arm].weights or cell.arm}"]
    made = {"teacher": teacher, "stage1": init}.get(about.student or "stage2", student)
    return [f"base@{seed}", *made, f"cell@{plan.profile}-{cell.name}"]


def list_nodes(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every node that the plan's cells need, with its parameters; names come once."""
    for world in plan.worlds:
        yield world, build_params(plan, world)
        for use in ("validation", "reporting"):
            yield f"{world}-{use}", build_clip_params(plan, world, use)
    done: set[str] = set()
    for cell in plan.cells:
        world, seed, about = cell.world, cell.seed, plan.trained_arm(cell.arm)
        own = plan.arms[cell.arm].weights or cell.arm
        nodes: dict[str, dict[str, Any]] = {"": {}, f"-teacher_{about.teacher}": {"teacher": about.teacher}}
        nodes |= {f"-init_{about.init}": {"init": about.init}}
        nodes |= {f"-{own}": {"arm": own}, f"-{cell.arm}": {"arm": cell.arm}}
        for suffix, what in nodes.items():
            if (name := f"{world}-{seed}{suffix}") not in done:
                done.add(name)
                yield name, build_params(plan, world, seed, **what)


def write_nodes(plan: Plan) -> None:
    """Write study/params: each node's parameters, the md5 of each stage's code, and the lists that study/dvc.yaml goes through."""
    (PARAMS / plan.profile).mkdir(parents=True, exist_ok=True)
    trees = [(f"{plan.profile}/{name}", tree) for name, tree in list_nodes(plan)]
    for name, tree in [*trees, ("code", hash_code()), ("nodes", describe_nodes(plan))]:
        file, text = PARAMS / f"{name}.json", json.dumps(tree, indent=1) + "\n"
        if not file.exists() or file.read_text() != text:
            write_atomically(file, text)


def describe_nodes(plan: Plan) -> dict[str, Any]:
    """Return what study/dvc.yaml goes through: lists for its matrices, and students and cells with the paths that they read."""
    students, cells = {}, {}
    for cell in plan.cells:
        paths = {name: path.relative_to(STUDY).as_posix() for name, path in locate_weights(plan, cell).items()}
        about = plan.trained_arm(cell.arm)
        own = f"{cell.world}-{cell.seed}-{plan.arms[cell.arm].weights or cell.arm}"
        if about.student == "stage2":
            students[f"{plan.profile}-{own}"] = {
                "name": own,
                "world": cell.world,
                "begin": paths["stage1"],
                "scores": paths["scores"],
                "out": paths["stage2"],
            }
        weights = paths[about.student or "stage2"]
        cells[f"{plan.profile}-{cell.name}"] = {
            "name": cell.name,
            "world": cell.world,
            "weights": weights,
            "clips": "reporting" if cell.counted else "validation",
        }
    seeds = sorted({cell.seed for cell in plan.cells})
    lists = {"profiles": [plan.profile], "worlds": [*plan.worlds], "seeds": seeds, "teachers": [*plan.teachers], "inits": [*plan.inits]}
    return lists | {"students": students, "cells": cells}


@cache
def hash_code() -> dict[str, str]:
    """Return the md5 of the code of each stage, as the pipeline's own dvc.yaml lists it."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    own = {stage: [dep for dep in entry["deps"] if dep.startswith(("cf_model/", "tasks/"))] for stage, entry in stages.items()}
    return {stage: _join_hashes([compute_dvc_md5(ROOT / dep) for dep in deps]) for stage, deps in own.items() if stage != "validate"}


def compute_cell_key(plan: Plan, cell: Cell) -> str:
    """Hash all parameters that a cell's numbers come from: a committed cell with another key is not of this plan."""
    about = plan.trained_arm(cell.arm)
    clips = build_clip_params(plan, cell.world, "reporting" if cell.counted else "validation")
    trees = [build_params(plan, cell.world), clips, build_params(plan, cell.world, cell.seed, teacher=about.teacher)]
    trees += [build_params(plan, cell.world, cell.seed, init=about.init), build_params(plan, cell.world, cell.seed, arm=cell.arm)]
    kept = [{name: section for name, section in tree.items() if name not in NOT_IN_KEY} for tree in trees]
    return _join_hashes([json.dumps([kept, about.scores], sort_keys=True)])


def _join_hashes(parts: list[str]) -> str:
    return hashlib.md5("\n".join(parts).encode(), usedforsecurity=False).hexdigest()


def open_folder(plan: Plan, name: str) -> Path:
    """Make a node's working folder, in which `cf` finds its parameters and the pipeline's stages; DVC does not look below it."""
    folder = WORK / plan.profile / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "params.yaml", (PARAMS / plan.profile / f"{name}.json").read_bytes())  # JSON is YAML
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    return folder


def make_clips(plan: Plan, world: str) -> None:
    """Render a world's clips, fit its codec and encode them; and the two sets that are only measured on, with that codec."""
    every = MADE / plan.profile / world
    made, folder = every / "training", open_folder(plan, world)
    clips, manifest, codec = made / "clips", made / "manifest.jsonl", made / "codec"
    run_stage(folder, "clips", out=clips)
    run_stage(folder, "filter", clips=clips, out=manifest)
    run_stage(folder, "codec", clips=clips, manifest=manifest, out=codec)
    run_stage(folder, "encode", clips=clips, manifest=manifest, codec=codec, out=made / "latents")
    run_stage(folder, "prompts", source=manifest, latents=made / "latents", out=made / "prompts")
    for use in ("validation", "reporting"):
        made, folder = every / use, open_folder(plan, f"{world}-{use}")
        run_stage(folder, "clips", out=made / "clips")
        run_stage(folder, "filter", clips=made / "clips", out=made / "manifest.jsonl")
        run_stage(folder, "encode", clips=made / "clips", manifest=made / "manifest.jsonl", codec=codec, out=made / "latents")


def train_model(plan: Plan, stage: str, name: str, out: Path, begin: Path | None = None, scores: Path | None = None) -> None:
    """Train one model of a node, from its last checkpoint if a training was stopped. `begin`: stage 2's first weights."""
    world, seed, *_ = name.split("-")
    every = MADE / plan.profile / world
    data, folder = every / "training", every / seed
    paths = {"latents": data / "latents", "codec": data / "codec"}
    if stage in ("causal_init", "stage1", "stage2"):
        paths["prompts"] = data / "prompts"
    if stage in ("teacher", "causal_init", "stage1"):
        paths["base"] = folder / "base"
    if stage == "stage1":
        paths["causal_init"] = out.with_name(out.name.replace("stage1", "causal_init"))
    if stage == "stage2":
        assert begin and scores
        paths |= {"teacher": scores, "student": begin}
    run_stage(open_folder(plan, name), stage, **paths, out=out)
