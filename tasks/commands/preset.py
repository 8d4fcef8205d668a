"""`cf profile use NAME` writes params.yaml from a complete file in profiles/; `cf preset use NAME` lays a published method over it.

A preset, in presets/, states how its method differs from the profile of the params file: memory, rollouts, scores. Sizes, steps, tau,
guidance and learning rates stay the profile's, so every preset runs on every profile. What presets decide begins as the profile has it:
a second preset undoes the first, and also what was changed there by hand.
"""

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tasks.files.atomic import write_atomically
from tasks.files.options import parse_options
from tasks.files.trees import list_nodes
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused

STUDENTS = ("causal_init", "stage1", "stage2")
# what presets decide, which is the profile's before a preset is laid over it: so a second preset undoes the first
DECIDED = [(stage, "memory") for stage in STUDENTS] + [("teacher", "view"), ("teacher", "errors")]
OPTIMIZERS = ("student_optimizer", "critic_optimizer")
DECIDED += [
    (stage, key)
    for stage in STUDENTS[1:]
    for key in ("rollouts", "critic_warmup", "batch", "rollout", "horizon", "teacher", "critic_weight", *OPTIMIZERS)
]


def main(argv: list[str]) -> None:
    args = parse_options("preset", argv, __doc__)
    if args.verb == "list":
        print_files("preset")
    else:
        changes = write_preset(args.params, args.name)
        print("\n".join(f"  {change}" for change in changes) or "  nothing but the systems to generate")
        print(f"{args.params} now holds preset {args.name}")


def use_profile(argv: list[str]) -> None:
    args = parse_options("profile", argv, __doc__)
    if args.verb == "list":
        print_files("profile")
    else:
        file = find_file("profile", args.name)
        way = "change a value there, here, or with `dvc exp run -S key=value`.\n"
        Path("params.yaml").write_text(f"# From {file.as_posix()} by `cf profile use {args.name}`; {way}{file.read_text()}")
        print(f"params.yaml now holds profile {args.name}")


def print_files(kind: str) -> None:
    """Print the names of the presets or profiles, and what each says it is."""
    for name, file in list_files(kind).items():
        first = file.read_text().split("\n", 1)[0]
        print(f"{name:<22} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


def list_files(kind: str) -> dict[str, Path]:
    """Return name -> file of the presets or profiles."""
    return {file.stem: file for file in sorted(Path(f"{kind}s").glob("*.yaml"))}


def find_file(kind: str, name: str) -> Path:
    """Return the file of a preset or profile; raise Refused for an unknown name."""
    files = list_files(kind)
    if name not in files:
        raise Refused(f"{kind} {name} isn't in {kind}s/; known are {', '.join(files) or 'none'}")
    return files[name]


def read_preset(name: str) -> dict[str, Any]:
    """Return a preset's values; of a preset with `from`, its parent's values with its own over them."""
    stated = yaml_file.read_yaml(find_file("preset", name))
    parent = stated.pop("from", None)
    return merge_values(read_preset(parent), stated) if parent else stated


def write_preset(path: Path, name: str) -> list[str]:
    """Write a preset's values into a params file, whose comments stay, and return what changed; raise Refused if the result is invalid."""
    from tasks.params.load import validate_params  # here, because `cf preset list` must not wait for torch

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 140, True
    yaml_file.read_yaml(path)  # refuses with a sentence what is no YAML
    before = yaml.load(path.read_text())
    stated = apply_preset(before, name)
    text = io.StringIO()
    yaml.dump(stated, text)
    try:
        validate_params(YAML(typ="safe", pure=True).load(text.getvalue()), path)
    except Refused as error:
        raise Refused(f"preset {name} doesn't fit {error}; start from another profile") from None
    write_atomically(path, text.getvalue())
    old, new = (dict(list_nodes(tree)) for tree in (before, stated))
    return [
        f"{key}: {old.get(key, 'not there')} -> {value}"
        for key, value in new.items()
        if not isinstance(value, Mapping) and old.get(key) != value and not key.startswith("generate.")
    ]


def apply_preset(stated: Any, name: str) -> Any:
    """Return the parameters with a preset's values: its memory for every student, and a system under its name in both suites.

    What presets decide is first set back to the profile that the parameters name, if that is one of profiles/.
    """
    preset = read_preset(name)
    preset = merge_values(preset, preset.get("sizes", {}).get(stated["profile"], {}))
    out = copy.deepcopy(stated)
    profile = list_files("profile").get(stated["profile"])
    plain = yaml_file.read_yaml(profile) if profile else stated
    for section, key in DECIDED:
        out[section][key] = merge_values(out[section][key], plain[section][key])
    for stage in STUDENTS:
        out[stage]["memory"] = merge_values(out[stage]["memory"], preset["memory"])
    for section in ("teacher", "stage1", "stage2"):
        out[section] = merge_values(out[section], preset[section])
    memory = merge_values(copy.deepcopy(out[preset["student"]]["memory"]), preset["generation"]) if preset["generation"] else None
    for suite in ("systems", "continuations"):
        for other in out["generate"][suite].keys() & list_files("preset").keys():
            del out["generate"][suite][other]  # of a preset that was laid over the parameters before
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
