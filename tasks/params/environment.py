"""Environment variables CF_*: name, type, default and meaning of each in one class, which `cf env` prints.

Nothing here changes a result: what does is in params.yaml. Code reads the values through tasks/files/settings.py.
"""

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused

PREFIX = "CF_"
INTEGER = "a whole number from"


def _variable(default: Any, meaning: str, rule: str = "1 or 0", **limits: Any) -> Any:
    """Declare a variable: its default, a sentence for `cf env`, and what completes "it must be ..." where a value is malformed."""
    return Field(default, description=meaning, json_schema_extra={"rule": rule}, **limits)


class Environment(BaseSettings):
    """Values of the CF_* variables of this process; an empty variable counts as absent."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore")

    # of cf up, cf deploy and the flows
    port: int | None = _variable(
        None, "Port of the server; default: the checkout's last one, else 4200.", f"{INTEGER} 1 to 65535", ge=1, le=65535
    )
    host: str | None = _variable(None, "Address of the server; default: the checkout's last one, else 127.0.0.1. Others need a password.")
    runs: int = _variable(1, "Flow runs at a time on this machine, of all deployments.", f"{INTEGER} 1 to 64", ge=1, le=64)
    reports: str | None = _variable(None, "Where links to reports lead; default: the server that `cf up` starts for them.")
    pool: str = _variable(
        "cf",
        "Work pool that `cf deploy` sends deployments to.",
        "a work pool's name in letters, digits and . _ -",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$",
    )
    root: str | None = _variable(
        None,
        "The project's folder on the machines that work for the pool; default: this checkout.",
        "the project's whole path on the machines that work for the pool, from / on",
        pattern=r"^/[^{}\r\n]*$",
    )
    alert_url: SecretStr | None = _variable(None, "URL that is sent a message when a night fails or doesn't happen. Secret.")
    heartbeat_url: SecretStr | None = _variable(None, "URL that is asked for once at the end of a good night. Secret.")
    judge_key: SecretStr | None = _variable(None, "Key of the endpoint that `cf score --judge URL` asks. Secret.")
    # of stages
    gpus: int | None = _variable(None, "GPUs to give away; default: all.", "the number of GPUs of this machine, 0 or more", ge=0)
    gpu_locks: Path | None = _variable(None, "Folder of the GPUs' locks; default: ~/.cache/cf/HOST.")
    ranks: int | None = _variable(None, "Processes of a training stage; default: one a GPU.", f"{INTEGER} 1 on", ge=1)
    grace: float = _variable(4.0, "Seconds between SIGTERM and SIGKILL for what a stage leaves behind.", "seconds, 0 or more", ge=0)
    clip_cache: str | None = _variable(None, "Folder of results of single clips, or off; default: work/kept.", validation_alias="CF_KEPT")
    dask: str | None = _variable(None, "Address of a Dask scheduler whose workers read and encode clips; default: none.")
    run: str | None = _variable(None, "Name that W&B gives to all stages of one command; default: one drawn for them.")
    ignore_plan: bool = _variable(False, "1 starts a stage that `cf plan` says won't fit.")
    traceback: bool = _variable(False, "1 shows where an error was raised.")
    # of containers (infra/entrypoint.sh) and tests
    repository: str | None = _variable(None, "Git repository that a container clones, without credentials in it.")
    branch: str = _variable("main", "Branch that a container clones.")
    checkout: Path | None = _variable(None, "Where a container clones it; default: ~/context-forcing.")
    system: bool = _variable(False, "1 runs tests/system, with a real server, worker and browser.")
    clips: Path | None = _variable(None, "Folder of real clips, 832 x 480 at 16 fps, that tests/metrics/test_real_clips.py scores.")
    screenshots: Path | None = _variable(None, "Folder that tests/system writes the screenshots of docs/ to.")
    # set by programs for programs
    machine: str | None = _variable(None, "Internal: the checkout that a process belongs to, for `cf down`.")
    guard: str | None = _variable(None, "Internal: the guardian that a process belongs to (flows/supervise/guardian.py).")
    nightly_cron: str | None = _variable(None, "Internal: nightly.cron of params.yaml, for infra/prefect.yaml.")
    nightly_timezone: str | None = _variable(None, "Internal: nightly.timezone of params.yaml, for infra/prefect.yaml.")

    def find_unknown(self) -> list[str]:
        """Say of each CF_* variable of the environment that has no field here, which variable may have been meant."""
        names = {variable_name(field) for field in Environment.model_fields}
        sentences = []
        for name in sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names):
            close = " or ".join(difflib.get_close_matches(name, names, 2))
            sentences.append(f"{name} means nothing here; " + (f"did you mean {close}?" if close else "`cf env` lists what does"))
        return sentences


def variable_name(field: str) -> str:
    return str(Environment.model_fields[field].validation_alias or f"{PREFIX}{field.upper()}")


def read_environment() -> Environment:
    """Read and check all CF_* variables; Refused names the first that is malformed."""
    try:
        return Environment()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        field = next(field for field in Environment.model_fields if name in (field, variable_name(field)))
        rule: Any = Environment.model_fields[field].json_schema_extra
        raise Refused(f"{variable_name(field)} is {first['input']!r}; it must be {rule['rule']}") from None


def main(argv: list[str]) -> None:
    parse_options("env", argv)
    values = read_environment()
    for field, info in Environment.model_fields.items():
        value = getattr(values, field)
        text = "-" if value is None else "(set)" if isinstance(value, SecretStr) else value
        changed = "" if info.default in (None, value) else f" (default: {info.default})"
        print(f"{variable_name(field):<20} {text}{changed}\n{'':<20} {info.description}")
    for sentence in values.find_unknown():
        print(f"warning: {sentence}")
