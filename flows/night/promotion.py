"""`cf promote`, `cf rollback`, `cf promoted`, `cf history`: the registry (flows/project/registry.py) by hand."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.cli import in_a_sentence
from flows.night.records import nights
from flows.project.registry import VERSION, alone, assign, assignments, fetch, named, promoted, register, rollback, versions

FETCHED = "the DVC cache has them, or the remote that the repository names"


def history(repo: Path) -> list[str]:
    """What happened, oldest first, one line each: nights, versions, promotions, rollbacks."""
    told = [(one.when, 1, f"version    {one.name}: {_of(one.about)}") for one in versions(repo)]
    for one in assignments(repo):
        word = "rollback  " if one.about.get("rollback") else "promoted  "
        told.append((one.when, 2, f"{word} {one.version.name}: {one.about.get('why') or _of(one.about)}"))
    told += [(night.when, 0, f"night      {night.date}: {night.outcome}, {night.why}") for night in nights(repo)]
    return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(when))}  {said}" for when, _, said in sorted(told)]


def _of(about: Mapping[str, Any]) -> str:
    return str(about.get("why") or about.get("said") or about.get("by") or about.get("md5") or "by hand")


@in_a_sentence
def promote(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf promote", description="Makes a student the promoted one, by hand: no gate is asked.")
    parser.add_argument("what", nargs="?", default="HEAD", help="a version such as v0.0.2, or a commit whose dvc.lock has models/stage2")
    parser.add_argument("--why", default="by hand")
    args, repo = parser.parse_args(argv), Path.cwd()
    with alone(repo):
        version = named(repo, args.what) if VERSION.fullmatch(args.what) else register(repo, args.what, {"by": "hand", "why": args.why})
        if version == promoted(repo):
            print(f"{version.name} is the promoted one already")
            return
        made = assign(repo, version, {"by": "hand", "why": args.why})
    print(f"{version.name} is promoted ({made.tag}, commit {version.commit[:12]}); `git push origin {version.tag} {made.tag}` tells others")


@in_a_sentence
def roll_back(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf rollback", description="Makes a student that was promoted before the promoted one again.")
    parser.add_argument("version", nargs="?", help="such as v0.0.1; default: the one that it took the place of")
    parser.add_argument("--why", default="by hand")
    args = parser.parse_args(argv)
    with alone(Path.cwd()):
        made = rollback(Path.cwd(), args.version, args.why)
    print(f"{made.version.name} is promoted again ({made.tag}); `git push origin {made.tag}` tells others")


@in_a_sentence
def told(argv: list[str]) -> None:
    argparse.ArgumentParser("cf history", description="Nights, versions, promotions and rollbacks, oldest first.").parse_args(argv)
    print("\n".join(history(Path.cwd())) or "nothing yet: no night has run, and no student was promoted")


@in_a_sentence
def show(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf promoted", description=f"The promoted student, and its weights: {FETCHED}.")
    parser.add_argument("--out", type=Path, help="a folder to put the weights into")
    args, repo = parser.parse_args(argv), Path.cwd()
    now = promoted(repo)
    if now is None:
        raise ValueError("no student is promoted; a night promotes one, or `cf promote`")
    if args.out:
        fetch(repo, now, args.out)
    print(f"{now.name} {now.commit[:12]} {now.about.get('md5', '')}" + (f" in {args.out}" if args.out else ""))


MAINS = {"promote": promote, "rollback": roll_back, "history": told, "promoted": show}

if __name__ == "__main__":
    MAINS[sys.argv[1]](sys.argv[2:])
