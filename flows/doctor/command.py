"""`cf doctor`: what a machine needs and what it may lack, one line each, and what to do. flows/doctor/server.py asks the server."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict

from flows.doctor.finding import Check, Line
from flows.doctor.this_machine import (
    check_disk,
    check_extensions,
    check_gpus,
    check_leftovers,
    check_locks,
    check_port,
    check_remote,
    check_versions,
    check_wandb,
    check_worktrees,
)
from flows.machine.settings import Machine, process_environment, read_machine


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf doctor", description="Looks for what is wrong with this machine. Exit code 1 if something fails.")
    parser.add_argument("--json", action="store_true", help="the same for programs: a list of name, level, said, todo")
    parser.add_argument("--fix", action="store_true", help="also remove what is stale: leftovers in the cache, locks nobody holds")
    asked = parser.parse_args(argv)
    lines = examine_machine(read_machine(), asked.fix)
    if asked.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    else:
        for line in lines:
            print(f"{line.level:<5}{line.name:<13}{line.said}" + (f"\n{'':<18}-> {line.todo}" if line.todo else ""))
    if any(line.level == "fail" for line in lines):
        raise SystemExit(1)


def examine_machine(machine: Machine, fix: bool = False) -> list[Line]:
    """A check that can't be made says so, and the others are made."""
    os.environ.update(process_environment(machine))  # before Prefect is imported, which reads it
    health = importlib.import_module("flows.doctor.server")
    checks: list[Check] = [check_versions, check_port, *health.CHECKS, check_disk, check_leftovers, check_locks, check_worktrees, check_gpus, check_extensions, check_remote, check_wandb]
    found: list[Line] = []
    for check in checks:
        try:
            found += check(machine, fix)
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            found.append(Line(check.__name__, "warn", f"could not be checked: {why}"))
    return found


# ------------------------------------------------------------------------------------------------------- the software


# -------------------------------------------------------------------------------------------------------- the machine


# ---------------------------------------------------------------------------------------------------- what lies beyond


if __name__ == "__main__":
    main(sys.argv[1:])
