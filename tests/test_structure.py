"""The rules of the house, checked: who may import whom, that no stage can go stale unnoticed, and how long a file may be."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import networkx
import pytest

from tasks.params import yaml_file
from tasks.params.project import Project
from tasks.runner.ranks import build_parser
from tests.breaks import BREAKS
from tests.order import AROUND, SECONDS

ROOT = Path(__file__).parent.parent
PACKAGES = ("cf_model", "tasks", "flows", "study")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
STATED = yaml_file.read_yaml(ROOT / "params.yaml")
STAGES: dict[str, dict[str, Any]] = yaml_file.fill_in_values(yaml_file.read_yaml(ROOT / "dvc.yaml")["stages"], STATED)
# The shell around the stages carries values and decides none (see the head of dvc.yaml), so no stage depends on it.
SHELL = {
    *(file for room in ("runner", "files", "wandb_log", "params") for file in (ROOT / "tasks" / room).rglob("*.py")),
    ROOT / "tasks/__main__.py",
}
SCHEMA = {file for file in SHELL if file.parent.name == "params"}
# package -> what it may not import
FORBIDDEN = {
    "cf_model": {"dvc", "prefect", "wandb", "pydantic", "yaml", "ruamel", "tasks", "flows", "study"},
    "tasks": {"dvc", "prefect", "flows", "study"},
    "flows": {"torch", "diffusers", "numpy", "wandb", "cf_model", "study"},
    "study": {"dvc", "prefect", "flows"},
}
SHARED = ("tasks.files", "tasks.params.yaml_file")  # all that flows may import of tasks: neither imports torch or pydantic
ALLOWED = {  # what judges a drawn world knows the rules that it is drawn with, and measures drift and repetition as of any video
    "cf_model/evaluate/oracle.py": "cf_model.data.worlds",
    "cf_model/evaluate/places.py": "cf_model.data.worlds",
    "cf_model/evaluate/course.py": "cf_model.metrics",
}
APART = {  # rooms of cf_model
    room: tuple({"data", "train", "evaluate", "metrics"} - {room}) for room in ("data", "train", "evaluate", "metrics")
}
WITHOUT_TRANSFORMER = ("validate", "clips", "filter", "codec", "encode", "prompts", "evaluate", "report")
TOPS = {  # what stands at the top of a package and not in a room
    "flows": {"__init__.py", "pipeline.py", "nightly.py", "evaluate.py", "cli.py"},
    "tasks": {"__init__.py", "__main__.py", *(f"{stage}.py" for stage in STAGES)},
}
ONE_WORD = 0.2  # share of module-level functions that may be called by one word
COMMENTED = ("cf_model/train", "cf_model/model")  # with at least five comment lines per 100 lines of code


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


# ---------------------------------------------------------------------------------------------------------- imports


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, also inside functions, but not what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from running(child)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(file: Path) -> Iterator[str]:
    """Dotted names, absolute: `from a import b` gives a and a.b, one of which is a module."""
    for node in running(tree(file)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield from dotted_names(file, node)


def dotted_names(file: Path, node: ast.ImportFrom | ast.Import) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    parts = file.relative_to(ROOT).with_suffix("").parts
    above = parts[: len(parts) - node.level] if node.level else ()
    base = ".".join([*above, *filter(None, [node.module])])
    yield base
    yield from (f"{base}.{alias.name}" for alias in node.names)


def module_file(dotted: str) -> list[Path]:
    path = (ROOT / dotted.replace(".", "/")).with_suffix(".py")
    return [path] if path.exists() else []


def ours(dotted: str) -> Iterator[Path]:
    """The file of a module of ours, and the packages above it that run something when they are imported."""
    yield from module_file(dotted)
    path = ROOT / dotted.replace(".", "/")
    for package in [path, *path.parents]:
        init = package / "__init__.py"
        if ROOT in package.parents and init.exists() and any(not isinstance(node, ast.Expr) for node in tree(init).body):
            yield init


def runs(file: Path, skip: set[Path], seen: set[Path] | None = None) -> set[Path]:
    """Project files that `file` runs or reads: what it imports, and what lies beside it and is named in it as a string."""
    seen = {file} if seen is None else seen
    for dotted in imports(file):
        for other in set(ours(dotted)) - skip - seen:
            seen.add(other)
            runs(other, skip, seen)
    for node in running(tree(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.-]+\.\w+", node.value):
            beside = file.parent / node.value
            if beside.is_file() and beside.suffix != ".py":
                seen.add(beside)
    return seen


def test_imports_go_one_way() -> None:
    for file in FILES:
        package, modules = file.relative_to(ROOT).parts[0], set(imports(file))
        roots = {dotted.split(".")[0] for dotted in modules}
        assert not roots & FORBIDDEN[package], name(file)
        if package == "flows":
            rooms = {dotted for dotted in modules if module_file(dotted) and dotted.startswith("tasks.")}
            beyond = {dotted for dotted in rooms if not dotted.startswith(SHARED)}
            assert not beyond, f"{name(file)}: flows may import {' and '.join(SHARED)} of tasks, and not {sorted(beyond)}"
        if name(file) != "tasks/wandb_log/run.py":
            assert "wandb" not in roots, f"{name(file)}: wandb is imported in tasks/wandb_log/run.py only"
        if file.parent != ROOT / "flows/project":
            assert "dvc" not in roots, f"{name(file)}: dvc is imported in flows/project only"


def test_what_flows_and_tasks_share_is_light() -> None:
    light = [name(file)[:-3].replace("/", ".") for file in (ROOT / "tasks/files").glob("*.py") if file.name != "__init__.py"]
    python = f"import sys, tasks.params.yaml_file, {', '.join(light)}; sys.exit(' '.join({{'torch', 'pydantic'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_model_is_quiet_and_its_rooms_are_apart() -> None:
    for file in (file for file in FILES if "cf_model" in file.parts):
        calls = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        assert "print" not in calls, name(file)
        others = APART.get(file.relative_to(ROOT / "cf_model").parts[0], ())
        found = {dotted for dotted in imports(file) for other in others if dotted.startswith(f"cf_model.{other}.")}
        found = {dotted for dotted in found if not dotted.startswith(ALLOWED.get(name(file), "-"))}
        assert not found, f"{name(file)}: data, train and evaluate use model, and not each other"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for type checkers count too, because a reader meets them as well."""
    graph = networkx.DiGraph()
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                graph.add_edges_from((name(file), name(other)) for dotted in dotted_names(file, node) for other in module_file(dotted))
    assert not [group for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def test_each_package_shows_its_stages_and_flows_at_the_top() -> None:
    for package, files in TOPS.items():
        assert {file.name for file in (ROOT / package).glob("*.py")} == files


# ------------------------------------------------------------------------------------------------------------ words


def test_functions_are_called_by_a_verb_and_its_object() -> None:
    for package in PACKAGES:
        files = [file for file in FILES if file.relative_to(ROOT).parts[0] == package]
        names = [node.name.strip("_") for file in files for node in tree(file).body if isinstance(node, ast.FunctionDef)]
        short = sorted(one for one in names if "_" not in one)
        assert len(short) <= ONE_WORD * len(names), f"{package}: {len(short)} of {len(names)}, {' '.join(short)}"


def test_the_method_is_commented() -> None:
    for folder in COMMENTED:
        lines = [line.strip() for file in (ROOT / folder).rglob("*.py") for line in file.read_text().splitlines() if line.strip()]
        comments = sum(line.startswith("#") for line in lines)
        assert comments >= 0.05 * (len(lines) - comments), f"{folder}: {comments} comment lines in {len(lines)}; write 5 to 10 per 100"


# ----------------------------------------------------------------------------------------------------------- stages


def code(stage: str) -> set[str]:
    """Of the project, what a stage runs. `validate` runs the schema itself."""
    skip = SHELL - SCHEMA if stage == "validate" else SHELL
    return {name(file) for file in runs(ROOT / f"tasks/{stage}.py", skip)}


def is_code(dep: str) -> bool:
    return dep.startswith(PACKAGES)


def chain(node: ast.AST) -> str | None:
    """`params.a.b` as "a.b"."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if parts and isinstance(node, ast.Name) and node.id == "params" else None


def reads(stage: str) -> set[str]:
    """Parameters by their longest dotted names: `spec = params.base` reads all of it, `params.base.window` one value."""
    files = [ROOT / file for file in code(stage) if file.startswith("tasks/") and file.endswith(".py") and ROOT / file not in SHELL]
    nodes = [node for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    return {found for node in nodes if id(node) not in inner and (found := chain(node))}


def options(stage: str) -> dict[str, str]:
    words = shlex.split(STAGES[stage]["cmd"])
    assert words[:4] == ["python", "-m", "tasks", stage]
    return dict(zip([word.removeprefix("--") for word in words[4::2]], words[5::2], strict=True))


def outs(stage: str) -> list[str]:
    entries = STAGES[stage].get("outs", []) + STAGES[stage].get("metrics", [])
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def within(one: str, other: str) -> bool:
    return Path(one).is_relative_to(other) or Path(other).is_relative_to(one)


def test_each_stage_is_a_file_with_run() -> None:
    assert all(hasattr(__import__(f"tasks.{stage}", fromlist=["run"]), "run") for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_it_runs(stage: str) -> None:
    """All of it, and no file or folder of which it runs nothing."""
    listed, needed = {dep for dep in STAGES[stage]["deps"] if is_code(dep)}, code(stage)
    missing = {file for file in needed if not any(Path(file).is_relative_to(dep) for dep in listed)}
    idle = {dep for dep in listed if not any(Path(file).is_relative_to(dep) for file in needed)}
    assert not missing and not idle, f"{stage} in dvc.yaml: add {sorted(missing)}, take out {sorted(idle)}"


def test_training_never_reruns_for_a_checkpoint_converter() -> None:
    assert [stage for stage in STAGES if "cf_model/foreign" in STAGES[stage]["deps"]] == ["base"], "only base reads foreign checkpoints"


def test_the_pipeline_can_be_read_at_once() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 250


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "validate"])
def test_a_stage_lists_exactly_the_parameters_it_reads(stage: str) -> None:
    listed, read = set(STAGES[stage]["params"]), reads(stage) - {"engine"}  # which changes no result, like the number of ranks
    assert {"seed", "threads"} <= listed, "the runner reads these for every stage"
    if "model_dump" in read:  # it shows them all
        listed, read = set(STAGES[stage]["params"]), set(STATED) - {"tracking", "nightly", "engine"}
    missing = {one for one in read if not any(one == key or one.startswith(f"{key}.") for key in listed)}
    unread = {key for key in listed - {"seed", "threads"} if not any(one == key or one.startswith(f"{key}.") for one in read)}
    assert not missing and not unread, f"{stage}: add {sorted(missing)}, take out {sorted(unread)}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_fits_the_stage(stage: str) -> None:
    """Options are those of run(); what it reads is a dependency; what it makes is an out."""
    module = __import__(f"tasks.{stage}", fromlist=["run"])
    parser = build_parser(stage, module.run, Project())
    words = shlex.split(STAGES[stage]["cmd"])[4:]
    paths = {key: value for key, value in vars(parser.parse_args(words)).items() if isinstance(value, Path) and key != "params"}
    deps = [dep for dep in STAGES[stage]["deps"] if not is_code(dep)]
    assert str(paths.pop("out")) in outs(stage)
    for value in paths.values():
        assert any(within(str(value), dep) for dep in deps), f"{stage} reads {value}, which is not in its deps"
    for dep in deps:
        assert any(within(dep, str(value)) for value in paths.values()), f"{stage} depends on {dep} and isn't handed it"
    assert stage == "validate" or f"metrics/{stage}.json" in outs(stage)


def test_stages_stand_in_running_order() -> None:
    made: list[str] = []
    for stage, entry in STAGES.items():
        for dep in entry["deps"]:
            assert is_code(dep) or any(Path(dep).is_relative_to(out) for out in made), f"{stage} reads {dep} before it is made"
        made += outs(stage)


@pytest.mark.slow
def test_stages_without_a_transformer_import_no_diffusers() -> None:
    modules = ", ".join(f"tasks.{stage}" for stage in WITHOUT_TRANSFORMER)
    python = f"import sys, {modules}; sys.exit(' '.join(m for m in ('diffusers', 'transformers', 'wandb') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_stage_imports_what_it_may_never_use() -> None:
    """What diffusers imports with any of its transformers (peft, accelerate, transformers, scipy) can't be left out."""
    unused = ("pandas", "sklearn", "wandb", "deepspeed", "torchao", "dvc", "prefect", "torch.utils.benchmark")
    modules = ", ".join(f"tasks.{stage}" for stage in STAGES)
    python = f"import sys, {modules}; sys.exit(' '.join(m for m in {unused} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ sizes


def test_files_that_are_said_to_be_slow_are_there() -> None:
    assert [file for file in (*SECONDS, *AROUND) if not (ROOT / "tests" / file).exists()] == []


def test_the_deliberate_breaks_are_of_code_that_is_there() -> None:
    """Or `python -m tests.breaks` would find that out when somebody needs it."""
    for file, text, _, tests in BREAKS:
        assert (ROOT / file).read_text().count(text) == 1, f"tests/breaks.py: {text!r} of {file}; rewrite the break with the code"
        assert [test for test in tests.split() if not (ROOT / test).exists()] == []


def test_files_and_functions_have_an_end() -> None:
    for file in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        assert len(file.read_text().splitlines()) <= 400, name(file)
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{name(file)}: {node.name}"
