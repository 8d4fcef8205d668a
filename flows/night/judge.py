"""One student's videos of the nightly prompts, and what they measure: the commands of dvc.yaml's `generate` and `evaluate`, with other
paths and fewer systems, in a folder of their own. Candidate and promoted student go the same way, so their numbers can be compared.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from flows.night.gate import Judged
from flows.project import dvc_lock, overrides
from flows.project.dvc_graph import stages
from flows.run.stage_task import environment, to_lock
from flows.supervise import command as supervise

GENERATE, EVALUATE, STUDENT, SUITE = "generate", "evaluate", "stage2", "prompts"
NAME = "student"  # of the judged system, in nightly.rules too


def measure(
    root: Path,
    name: str,
    *,
    student: Path,
    codec: Path,
    prompts: Path | None,
    run: str,
    repo: Path,
    line: Callable[[str], None],
    version: str | None = None,
) -> Judged:
    """Into work/judged/NAME of the worktree. Killed and started again, it goes on with the videos that it lacks."""
    folder = root / "work/judged" / name
    folder.mkdir(parents=True, exist_ok=True)
    stated = overrides.read((root / "params.yaml").read_text())
    write(folder / "params.yaml", parameters(stated, prompts))
    samples, params = folder / "samples", folder / "params.yaml"
    for stage, given in (
        (GENERATE, {STUDENT: student, "codec": codec, "out": samples}),
        (EVALUATE, {"samples": samples, "out": folder / "results"}),
    ):
        words = command(root, stated, stage, {**given, "params": params})
        _run(root, folder, stage, words, run=run, repo=repo, line=line)
    rows = [json.loads(row) for row in (samples / "index.jsonl").read_text().splitlines()]
    shown = [(str(row["prompt"]), int(row["seed"])) for row in rows if (row["suite"], row["system"]) == (SUITE, NAME)]
    numbers = json.loads((folder / f"metrics/{EVALUATE}.json").read_text())
    return Judged(md5=dvc_lock.md5(student), numbers=numbers, shown=shown, version=version)


def write(path: Path, stated: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(stated, file)


def parameters(stated: Mapping[str, Any], prompts: Path | None) -> dict[str, Any]:
    """params.yaml with the nightly prompts (a file, or else captions) and seeds, and this one system."""
    night, generate = stated["nightly"], stated["generate"]
    systems = [one for one in generate["systems"].values() if one["weights"] == STUDENT]
    if not systems:
        raise ValueError(f"generate.systems has no system whose weights are {STUDENT}, so there is nothing to judge")
    changed = {
        "systems": {NAME: systems[0]},
        "continuations": {},
        "continued": 1,
        "prompts": night["prompts"],
        "seeds": night["seeds"],
        "prompts_file": prompts and str(prompts),
    }
    return {**stated, "generate": {**generate, **changed}}


def command(root: Path, stated: Mapping[str, Any], stage: str, given: Mapping[str, Path]) -> list[str]:
    """The stage's own, by dvc.yaml, with absolute paths, and these in the place of its own."""
    words = shlex.split(yaml.safe_load((root / "dvc.yaml").read_text())["stages"][stage]["cmd"])
    if words[:3] != ["python", "-m", "tasks"]:
        raise ValueError(f"the command of {stage} in dvc.yaml is no `python -m tasks ...`")
    options = dict(zip(words[4::2], (str(root / _filled(word, stated)) for word in words[5::2]), strict=True))
    options |= {f"--{name}": str(path) for name, path in given.items()}
    return [sys.executable, "-m", "tasks", stage, *(word for pair in options.items() for word in pair)]


def _filled(word: str, stated: Mapping[str, Any]) -> str:
    """${a.b} as DVC fills it in."""

    def value(found: re.Match[str]) -> str:
        node: Any = stated
        for part in found[1].split("."):
            node = node[part]
        return str(node)

    return re.sub(r"\$\{([\w.-]+)\}", value, word)


def _run(root: Path, folder: Path, stage: str, words: list[str], *, run: str, repo: Path, line: Callable[[str], None]) -> None:
    what = next(one for one in stages(root) if one.name == stage)
    said: list[str] = []

    def hear(text: str) -> None:
        if text.strip():
            said.append(text.rstrip())
            line(said[-1])

    # our tasks are found by this path: in the folder they would be those of the checkout that is installed
    surroundings = {**environment(run, root, repo), "PYTHONPATH": str(root), "WANDB_MODE": "disabled"}
    code = supervise.run(words, cwd=folder, env=surroundings, line=hear, gpus=to_lock(what, line), timeout=what.timeout)
    if code:
        raise RuntimeError("\n".join([f"{stage} of {folder.name} failed", *said[-20:]]))
