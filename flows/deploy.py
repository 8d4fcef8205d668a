"""`cf deploy`: the deployments of infra/prefect.yaml, with cron and timezone from params.yaml, sent to this machine's server."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from flows import overrides
from flows.settings import environment, healthy, here

DEPLOYMENTS = Path(__file__).parent.parent / "infra/prefect.yaml"


def main(argv: list[str]) -> None:
    argparse.ArgumentParser("cf deploy", description=__doc__).parse_args(argv)
    machine = here()
    if not healthy(machine):
        raise ValueError(f"no Prefect server answers at {machine.url}; `cf up` starts one")
    env = environment(machine) | {"CF_ROOT": str(machine.root)} | nightly(machine.root)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(command, cwd=machine.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"prefect deploy failed: {done.stdout.strip()[-1500:]}")
    names = [entry["name"] for entry in YAML(typ="safe", pure=True).load(DEPLOYMENTS)["deployments"]]
    print(f"deployed {', '.join(names)}: {machine.url}/deployments")


def nightly(root: Path) -> dict[str, str]:
    stated = overrides.read((root / "params.yaml").read_text()).get("nightly")
    if not isinstance(stated, dict) or not {"cron", "timezone"} <= stated.keys():
        raise ValueError("params.yaml states no nightly.cron and nightly.timezone; `cf profile use tiny` writes a file that does")
    return {"CF_NIGHTLY_CRON": str(stated["cron"]), "CF_NIGHTLY_TIMEZONE": str(stated["timezone"])}


if __name__ == "__main__":
    main(sys.argv[1:])
