"""`cf promote`, `cf rollback`, `cf promoted`, `cf history`: the registry (flows/project/registry.py) by hand."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.cli import one_line_errors
from flows.night.records import read_nights
from flows.project import registry
from tasks.files.options import parse_options


def history_lines(repo: Path) -> list[str]:
    """Return what happened, oldest first, one line each: nights, versions, promotions, rollbacks."""
    # nights before the versions and promotions of the same second
    events = [(night.when, 0, f"night      {night.date}: {night.outcome}, {night.why}") for night in read_nights(repo)]
    events += [(version.when, 1, f"version    {version.name}: {_reason(version.about)}") for version in registry.list_versions(repo)]
    for assignment in registry.list_assignments(repo):
        word = "rollback  " if assignment.about.get("rollback") else "promoted  "
        events.append((assignment.when, 2, f"{word} {assignment.version.name}: {_reason(assignment.about)}"))
    return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(when))}  {text}" for when, _, text in sorted(events)]


def _reason(about: Mapping[str, Any]) -> str:
    return str(about.get("why") or about.get("said") or about.get("by") or about.get("md5") or "by hand")


@one_line_errors
def promote_student(argv: list[str]) -> None:
    """Run `cf promote`: make a version, or a commit's student, the promoted one."""
    args, repo = parse_options("promote", argv), Path.cwd()
    about = {"by": "hand", "why": args.why}
    with registry.lock_registry(repo):
        by_name = registry.VERSION.fullmatch(args.what)
        version = registry.find_version(repo, args.what) if by_name else registry.register_version(repo, args.what, about)
        if version == registry.find_promoted(repo):
            print(f"{version.name} is the promoted one already")
            return
        tag = registry.assign_version(repo, version, about).tag
    print(f"{version.name} is promoted ({tag}, commit {version.commit[:12]}); `git push origin {version.tag} {tag}` tells others")


@one_line_errors
def roll_back_student(argv: list[str]) -> None:
    """Run `cf rollback`: promote an earlier version again, by one more tag."""
    args = parse_options("rollback", argv)
    with registry.lock_registry(Path.cwd()):
        assignment = registry.roll_back(Path.cwd(), args.version, args.why)
    print(f"{assignment.version.name} is promoted again ({assignment.tag}); `git push origin {assignment.tag}` tells others")


@one_line_errors
def show_history(argv: list[str]) -> None:
    """Run `cf history`."""
    parse_options("history", argv)
    print("\n".join(history_lines(Path.cwd())) or "nothing yet: no night has run, and no student was promoted")


@one_line_errors
def show_promoted(argv: list[str]) -> None:
    """Run `cf promoted`: name the promoted student, and fetch its weights with --out."""
    args, repo = parse_options("promoted", argv), Path.cwd()
    now = registry.find_promoted(repo)
    if now is None:
        raise ValueError("no student is promoted; a night promotes one, or `cf promote`")
    if args.out:
        registry.fetch_weights(repo, now, args.out)
    print(f"{now.name} {now.commit[:12]} {now.about.get('md5', '')}" + (f" in {args.out}" if args.out else ""))


MAINS = {"promote": promote_student, "rollback": roll_back_student, "history": show_history, "promoted": show_promoted}

if __name__ == "__main__":
    MAINS[sys.argv[1]](sys.argv[2:])
