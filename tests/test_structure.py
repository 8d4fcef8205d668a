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

import pytest

import tasks.__main__ as cf
from tasks import params_file
from tests.order import SECONDS

ROOT = Path(__file__).parent.parent
PACKAGES = ("cf_model", "tasks", "flows")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
STATED = params_file.read(ROOT / "params.yaml")
STAGES: dict[str, dict[str, Any]] = params_file.pipeline(ROOT / "dvc.yaml", STATED)
# carries values and decides none: see the head of dvc.yaml
SHELL = {ROOT / "tasks" / name for name in ("__main__.py", "params.py", "params_file.py", "runner.py", "tracking.py", "mirror.py")}
# package -> what it may not import
FORBIDDEN = {
    "cf_model": {"dvc", "prefect", "wandb", "pydantic", "yaml", "ruamel", "tasks", "flows"},
    "tasks": {"dvc", "prefect", "flows"},
    "flows": {"torch", "diffusers", "numpy", "wandb", "cf_model", "tasks"},
}
ALLOWED = {"cf_model/evaluate/oracle.py": "cf_model.data.worlds"}  # it judges by the rules the world is drawn with
WITHOUT_TRANSFORMER = ("validate", "clips", "filter", "codec", "encode", "evaluate", "report")


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
    parts = file.relative_to(ROOT).with_suffix("").parts
    for node in running(tree(file)):
        if isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(dotted: str) -> Iterator[Path]:
    """The file of a module of ours, and the packages above it that run something when they are imported."""
    path = ROOT / dotted.replace(".", "/")
    if path.with_suffix(".py").exists():
        yield path.with_suffix(".py")
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
    """Of each file by itself; `lint-imports`, with the contracts in pyproject.toml, also follows what is imported through others."""
    found = []
    for file in FILES:
        package = file.relative_to(ROOT).parts[0]
        roots = {dotted.split(".")[0] for dotted in imports(file)}
        found += [f"{name(file)} imports {root}" for root in sorted(roots & FORBIDDEN[package])]
        if name(file) != "tasks/mirror.py" and "wandb" in roots:
            found.append(f"{name(file)} imports wandb, which tasks/mirror.py does only")
        if name(file) != "flows/stages.py" and "dvc" in roots:
            found.append(f"{name(file)} imports dvc, which flows/stages.py does only")
    assert not found


def test_the_model_is_quiet_and_its_rooms_are_apart() -> None:
    """data, train and evaluate use model, and not each other."""
    found = []
    for file in [file for file in FILES if "cf_model" in file.parts]:
        calls = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        found += [f"{name(file)} prints" for call in calls if call == "print"]
        room, *_ = file.relative_to(ROOT / "cf_model").parts
        others = {"data", "train", "evaluate"} - {room}
        inner = {dotted for dotted in imports(file) for other in others if dotted.startswith(f"cf_model.{other}.")}
        found += [f"{name(file)} imports {dotted}" for dotted in sorted(inner) if not dotted.startswith(ALLOWED.get(name(file), "-"))]
    assert not found


# ----------------------------------------------------------------------------------------------------------- stages


def code(stage: str) -> set[str]:
    """Of the project, what a stage runs. `validate` runs the schema itself."""
    skip = SHELL - {ROOT / "tasks/params.py"} if stage == "validate" else SHELL
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
    assert list(cf.stages()) == list(STAGES)


def test_a_stage_depends_on_exactly_the_code_it_runs() -> None:
    """In dvc.yaml, against what tasks/<stage>.py runs."""
    listed = {stage: sorted(dep for dep in entry["deps"] if is_code(dep)) for stage, entry in STAGES.items()}
    assert listed == {stage: sorted(code(stage)) for stage in STAGES}


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
    parser = cf.command_line(stage, module.run)
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


def test_stages_without_a_transformer_import_no_diffusers() -> None:
    modules = ", ".join(f"tasks.{stage}" for stage in WITHOUT_TRANSFORMER)
    python = f"import sys, {modules}; sys.exit(' '.join(m for m in ('diffusers', 'transformers', 'wandb') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", python], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ sizes


def test_files_that_are_said_to_be_slow_are_there() -> None:
    assert [file for file in SECONDS if not (ROOT / "tests" / file).exists()] == []


def test_files_and_functions_fit_a_screen_or_say_why() -> None:
    found = []
    for file in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        text = file.read_text()
        if re.match(r"(#.*\n)*# Long: ", text):
            continue
        if len(text.splitlines()) > 250:
            found.append(f"{name(file)} has {len(text.splitlines())} lines")
        functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]
        found += [f"{name(file)}: {one.name} is long" for one in functions if (one.end_lineno or 0) - one.lineno >= 60]
    assert not found
