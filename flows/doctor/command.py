"""`cf doctor`: what a machine needs and what it may lack, one line each, and what to do about it."""

import json
import os
import sys
from dataclasses import asdict

from flows.doctor import this_machine
from flows.doctor.finding import Finding
from flows.machine.settings import Machine, process_environment, read_machine
from tasks.files.options import parse_options


def main(argv: list[str]) -> None:
    options = parse_options("doctor", argv)
    findings = examine_machine(read_machine(), options.fix)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.level:<5}{finding.name:<13}{finding.said}" + (f"\n{'':<18}-> {finding.todo}" if finding.todo else ""))
    if any(finding.level == "fail" for finding in findings):
        raise SystemExit(1)


def examine_machine(machine: Machine, fix: bool = False) -> list[Finding]:
    """Make all checks, and with `fix` mend what is stale. One that can't be made says so in its finding, and the others are made."""
    os.environ.update(process_environment(machine))
    from flows.doctor import server  # imports Prefect, which reads the environment

    checks = [this_machine.check_versions, this_machine.check_environment, this_machine.check_port]
    checks += [server.check_server, server.check_programs, server.check_alerts]
    checks += [this_machine.check_disk, this_machine.check_leftovers, this_machine.check_locks, this_machine.check_worktrees]
    checks += [this_machine.check_gpus, this_machine.check_extensions, this_machine.check_remote, this_machine.check_wandb]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(machine, fix)
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            findings.append(Finding(check.__name__.removeprefix("check_"), "warn", f"could not be checked: {why}"))
    return findings


if __name__ == "__main__":
    main(sys.argv[1:])
