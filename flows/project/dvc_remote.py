"""The DVC remote: the only way by which checkouts on different machines hand over to each other.

`dvc push --run-cache` sends results together with what they were made from, and `dvc repro --pull` takes them where the same stage is
asked for again, with nothing committed. Two things are stated for every remote. `verify`: without it a damaged object is restored
under its good md5. Time limits: DVC waits for ever for a server that has stopped answering, and its own give up only on some of them.
Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from a profile, never from .dvc/config.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.project import dvc_graph
from flows.project.dvc_config import is_secret
from flows.supervise import command as supervise

LIMIT = 3600.0  # Choice: seconds of one attempt. What it has sent stays sent, so four attempts are four hours of sending.
DELAYS = [30.0, 120.0, 600.0]  # Choice: a restarted server is back by the first, a rebooted machine by the second
CONNECT, READ = 5, 60  # seconds that one request may take to connect, and between two packets
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PORTS = {"s3": 443, "gs": 443, "https": 443, "http": 80, "ssh": 22, "webdav": 80, "webdavs": 443}
HOSTS = {"s3": "s3.amazonaws.com", "gs": "storage.googleapis.com"}  # where the host in the URL is a bucket
FINAL = (  # another attempt would end the same
    "Unable to locate credentials",
    "bucket does not exist",
    "Access Denied",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "requires 'dvc-",
)
EXAMPLES = """examples:
  cf remote add lab s3://bucket/context-forcing --endpoint https://s3.lab.example   in .dvc/config; --local: in .dvc/config.local
  cf remote check                            is it there, and is it set up so that damage is seen?
  cf remote push                             results and run cache, within an hour; again where it was cut
  dvc repro --pull                           on another machine: what was made elsewhere is taken, the rest is made here"""


class RemoteAway(RuntimeError):
    """The remote didn't answer, or not in time. Later it may."""


class RemoteMisconfigured(RuntimeError):
    """A person must change something first."""


def read_remote(root: Path) -> tuple[str, dict[str, str]]:
    """Name and options of the default remote, from all of DVC's levels of configuration."""
    done = subprocess.run([*_dvc(), "config", "--list"], cwd=root, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RemoteMisconfigured(f"DVC can't read its configuration in {root}: {_last_complaint(done.stderr.splitlines())}")
    stated = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    name = stated.get("core.remote")
    if not name:
        raise RemoteMisconfigured(f"{root} has no DVC remote to hand over through; `cf remote add NAME URL` sets one up")
    prefix = f"remote.{name}."
    return name, {key.removeprefix(prefix): value for key, value in stated.items() if key.startswith(prefix)}


def check_remote(root: Path) -> str:
    """The remote's name and URL, if it is set up as this file says and answers; one sentence otherwise."""
    name, options = read_remote(root)
    url = options.get("url", "")
    if not url:
        raise RemoteMisconfigured(f"core.remote names {name}, which is not set up; `cf remote add {name} URL` does")
    if options.get("verify") != "true":
        way = f"`dvc remote modify {name} verify true`"
        raise RemoteMisconfigured(f"remote {name} doesn't state verify = true, so DVC would take damaged objects for good ones; {way}")
    committed = configparser.ConfigParser(interpolation=None, strict=False)
    committed.read(root / ".dvc/config")
    for section in committed.sections():
        if held := next(filter(is_secret, committed[section]), None):
            raise RemoteMisconfigured(f"{section} holds {held} in .dvc/config, which is committed; state it in the environment instead")
        if re.search(r"//[^/@:]*:[^/@]*@", committed[section].get("url", "")):
            raise RemoteMisconfigured(f"{section} holds a password in its url in .dvc/config, which is committed; state it in the environment")
    shown = re.sub(r"//[^/@]*@", "//", url)  # a person may have written a password into it
    _check_answers(root, name, url, shown, options)
    return f"{name} ({shown})"


def _check_answers(root: Path, name: str, url: str, shown: str, options: dict[str, str]) -> None:
    """A folder must be there: DVC would make it, on the disk below an unmounted share, and call that a push."""
    stated = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") if url.startswith("s3://") else None
    address = urlsplit(options.get("endpointurl") or stated or url)
    if "://" not in url:
        if not (root / ".dvc" / url).is_dir():  # as DVC reads it, whose answer is absolute
            raise RemoteAway(f"remote {name} is the folder {url}, which is not there; mount its disk, or make it if it is new")
        return
    host = HOSTS.get(address.scheme) or address.hostname
    port = address.port or PORTS.get(address.scheme)
    loopback = host in ("127.0.0.1", "::1", "localhost")
    if not host or not port or (urllib.request.getproxies() and not loopback):
        return  # only DVC can tell
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise RemoteAway(f"remote {name} ({shown}) doesn't answer at {host}:{port}: {why}; start it, or see to the network") from error


def push_outs(root: Path, *, targets: list[str] | None = None, timeout: float = LIMIT, line: Callable[[str], None] = lambda _: None) -> None:
    """Sends results and run cache, within `timeout` seconds. Away, or Misconfigured, in one sentence.

    It holds DVC's lock on the checkout all the while: a stage that ends meanwhile waits to be recorded. So after the stages, or
    with a short limit. Results that are already there are not sent again.
    """
    _run_transfer(root, "push", targets, timeout, line)


def pull_outs(root: Path, *, targets: list[str] | None = None, timeout: float = LIMIT, line: Callable[[str], None] = lambda _: None) -> None:
    """Takes what dvc.lock names, and the run cache. One that was killed goes on where it was. Never beside a running stage: DVC
    doesn't lock what it replaces. Without a dvc.lock there is nothing to name: `dvc repro --pull`."""
    _run_transfer(root, "pull", targets, timeout, line)


def _run_transfer(root: Path, verb: str, targets: list[str] | None, timeout: float, line: Callable[[str], None]) -> None:
    where = check_remote(root)
    said: list[str] = []

    def hear(words: str) -> None:
        if words.strip():
            said.append(words)
            line(words)

    command = [*_dvc(), "--wait-for-lock", verb, "--run-cache", "--", *(targets or [])]
    try:
        code = supervise.run(command, cwd=root, env=_environment(), line=hear, timeout=timeout)
    except TimeoutError:
        raise RemoteAway(f"remote {where} took more than {timeout:g} s for `dvc {verb}`; what was done stays done, and another goes on") from None
    if code:
        kind = RemoteMisconfigured if any(word in words for word in FINAL for words in said) else RemoteAway
        raise kind(f"`dvc {verb}` with remote {where} failed: {_last_complaint(said)}")


def mend_remote(root: Path) -> list[str]:
    """Takes away what is damaged on the remote, so that the next push of a machine that has it whole sends it again."""
    check_remote(root)
    if not (root / "dvc.lock").exists():
        raise RemoteMisconfigured(f"{root} has no dvc.lock, which names what is on the remote; run the pipeline first")
    return dvc_graph.remove_damaged(root)


def should_retry(task: Any, run: Any, state: Any) -> bool:
    """Prefect asks it between two attempts."""
    return not supervise.is_stopping() and not isinstance(state.result(raise_on_failure=False), RemoteMisconfigured)


RETRIES: dict[str, Any] = {"retries": len(DELAYS), "retry_delay_seconds": DELAYS, "retry_condition_fn": should_retry}


@task(name="push", task_run_name="push", cache_policy=NO_CACHE, **RETRIES)
def push_task(root: Path, targets: list[str] | None = None, timeout: float = LIMIT) -> str:
    """A task of its own, so that a remote which is away never marks a finished stage as failed. Ask it for its state."""
    push_outs(root, targets=targets, timeout=timeout, line=get_run_logger().info)
    return f"pushed {', '.join(targets) if targets else 'everything'}"


# --------------------------------------------------------------------------------------------------------------- DVC


def _dvc() -> list[str]:
    return [sys.executable, "-m", "dvc"]


def _environment() -> dict[str, str]:
    """A request is tried three times instead of five, with growing pauses: what is left to try is the task's to try."""
    return {"AWS_MAX_ATTEMPTS": "3", **os.environ, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _last_complaint(lines: list[str]) -> str:
    """DVC's last complaint; above it there may be one for every file."""
    errors = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
    last = next(iter(errors[::-1]), "") or (lines[-1].strip() if lines else "without a word")
    return " ".join(last.removeprefix("unexpected error - ").split())[:500]


def add_remote(root: Path, name: str, url: str, *, endpoint: str | None = None, local: bool = False) -> str:
    """The default remote of this checkout, set up as this file says. Stating it again replaces it."""
    if not NAME.fullmatch(name):
        raise RemoteMisconfigured(f"{name!r} can't be the name of a remote; use lower-case letters, digits, - and _, at most 63")
    for words in filter(None, (url, endpoint)):
        if words.startswith("-") or any(not character.isprintable() for character in words):
            raise RemoteMisconfigured(f"{words!r} is neither a URL nor a folder")
        parts = urlsplit(words)
        if "://" in words and (parts.password or (parts.username and parts.scheme != "ssh") or parts.query):
            raise RemoteMisconfigured("the remote's URL holds credentials, which DVC would write into a file; state them in the environment")
    if endpoint and not url.startswith("s3://"):
        raise RemoteMisconfigured(f"--endpoint is for s3:// remotes, and {url} is none; leave it out")
    if "://" not in url:
        url = str((Path.cwd() / url).resolve())
    options = {"verify": "true"}
    if url.startswith(("s3://", "http://", "https://")):
        options |= {"connect_timeout": str(CONNECT), "read_timeout": str(READ)}
    options |= {"endpointurl": endpoint} if endpoint else {}
    level = ["--local"] if local else []
    _ask(root, "remote", "add", *level, "--force", "--default", name, url)
    for key, value in options.items():
        _ask(root, "remote", "modify", *level, name, key, value)
    return f"remote {name} is {url}, in .dvc/config{'.local' if local else '; commit it'}"


def _ask(root: Path, *words: str) -> None:
    done = subprocess.run([*_dvc(), *words], cwd=root, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RemoteMisconfigured(f"`dvc {' '.join(words[:2])}` refused: {_last_complaint(done.stderr.splitlines())}")


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf remote", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    new = verbs.add_parser("add", help="the remote of this checkout: verified, with time limits")
    new.add_argument("name")
    new.add_argument("url", help="s3://bucket/folder, or a folder")
    new.add_argument("--endpoint", help="of an S3 server that isn't Amazon's")
    new.add_argument("--local", action="store_true", help="on this machine only: .dvc/config.local")
    verbs.add_parser("check", help="is it there, and set up right?")
    for verb, said in (("push", "send results and run cache"), ("pull", "take what dvc.lock names, and the run cache")):
        one = verbs.add_parser(verb, help=said)
        one.add_argument("targets", nargs="*", help="stages; default: all")
        one.add_argument("--timeout", type=float, default=LIMIT, help=f"seconds, {LIMIT:g} by default")
    verbs.add_parser("mend", help="read all that dvc.lock names there; what is damaged goes, for the next push to send again")
    args = parser.parse_args(argv)
    root = Path.cwd()
    try:
        if args.verb == "add":
            print(add_remote(root, args.name, args.url, endpoint=args.endpoint, local=args.local))
        elif args.verb == "check":
            print(f"{check_remote(root)} is there, and set up right")
        elif args.verb == "mend":
            gone = mend_remote(root)
            print(f"{len(gone)} damaged objects removed{'; now push from a machine that has them: cf remote push' if gone else ''}")
        else:
            transfer = push_outs if args.verb == "push" else pull_outs
            transfer(root, targets=args.targets or None, timeout=args.timeout, line=print)
    except (RemoteAway, RemoteMisconfigured) as error:
        sys.exit(f"cf remote {args.verb}: {error}")
