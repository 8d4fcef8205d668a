"""`cf profile`: list the complete parameter files in profiles/, or write one of them to params.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

from tasks.params.yaml_file import Refused

FOLDER = Path("profiles")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf profile", description="The complete parameter files in profiles/.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="their names, and what each says it is")
    verbs.add_parser("use", help="write params.yaml from one of them").add_argument("name")
    args = parser.parse_args(argv)
    files = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    if args.verb == "list":
        for name, file in files.items():
            first = file.read_text().split("\n", 1)[0]
            print(f"{name:<12} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
        return
    if args.name not in files:
        raise Refused(f"profile {args.name} isn't in {FOLDER}/; known are {', '.join(files) or 'none'}")
    file = files[args.name]
    header = f"# From {file.as_posix()} by `cf profile use {args.name}`; change a value there, here, or with `dvc exp run -S key=value`.\n"
    Path("params.yaml").write_text(header + file.read_text())
    print(f"params.yaml now holds profile {args.name}")
