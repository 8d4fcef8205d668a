"""`cf preset`: published methods as settings; `cf preset use NAME` writes presets/NAME.yaml over the values of params.yaml.

A preset states what its method decides (memory, rollouts, scores); sizes, steps and learning rates stay those of the profile.
"""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tasks.files.atomic import write_atomically
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused

FOLDER = Path("presets")
STUDENTS = ("causal_init", "stage1", "stage2")
EXAMPLES = """examples:
  cf preset list
  cf profile use tiny && cf preset use self_forcing_pp && dvc repro
  cf preset use cf_paper --params other.yaml"""


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf preset", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="their names, and what each says it is")
    use = verbs.add_parser("use", help="write a preset's values into params.yaml")
    use.add_argument("name")
    use.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    args = parser.parse_args(argv)
    if args.verb == "list":
        for name, file in list_presets().items():
            print(f"{name:<22} {file.read_text().splitlines()[0].lstrip('# ')}")
        return
    write_preset(args.params, args.name)
    print(f"{args.params} now holds preset {args.name}; `git diff {args.params}` shows what it changed")


def list_presets() -> dict[str, Path]:
    """Return name -> file of the presets."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def read_preset(name: str) -> dict[str, Any]:
    """Return a preset's values; of a preset with `from`, its parent's values with its own over them."""
    files = list_presets()
    if name not in files:
        raise Refused(f"preset {name} isn't in {FOLDER}/; known are {', '.join(files) or 'none'}")
    stated = yaml_file.read_yaml(files[name])
    parent = stated.pop("from", None)
    return merge_values(read_preset(parent), stated) if parent else stated


def write_preset(path: Path, name: str) -> None:
    """Write a preset's values into a params file, whose comments stay; raise Refused if the result is invalid."""
    from tasks.params.load import validate_params  # here, because `cf preset list` must not wait for torch

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 140, True
    yaml_file.read_yaml(path)  # refuses with a sentence what is no YAML
    stated = apply_preset(yaml.load(path.read_text()), name)
    text = io.StringIO()
    yaml.dump(stated, text)
    try:
        validate_params(YAML(typ="safe", pure=True).load(text.getvalue()), path)
    except Refused as error:
        raise Refused(f"preset {name} doesn't fit {error}; start from another profile") from None
    write_atomically(path, text.getvalue())


def apply_preset(stated: Any, name: str) -> Any:
    """Return the parameters with a preset's values: its memory for every student, and a system under its name in both suites."""
    preset = read_preset(name)
    out = copy.deepcopy(stated)
    for stage in STUDENTS:
        out[stage]["memory"] = merge_values(out[stage]["memory"], preset["memory"])
    for section in ("teacher", "stage1", "stage2"):
        out[section] = merge_values(out[section], preset[section])
    memory = {**preset["memory"], **preset["generation"]} if preset["generation"] else None
    for suite in ("systems", "continuations"):
        frames = out["generate"][suite]["stage2"]["frames"]
        out["generate"][suite][name] = {"weights": preset["student"], "memory": memory, "view": None, "frames": frames}
    return out


def merge_values(under: Any, over: Any) -> Any:
    """Return `under` with the values of `over`, key by key. The type of `under` stays, because it holds the file's comments."""
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    out = copy.deepcopy(under)
    for key, value in over.items():
        out[key] = merge_values(under[key], value) if key in under else value  # type: ignore[index]
    return out
