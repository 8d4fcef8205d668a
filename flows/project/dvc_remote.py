"""The DVC remote: the only way by which checkouts on different machines hand over to each other.

`dvc push --run-cache` sends results together with what they were made from, and `dvc repro --pull` takes them where the same stage is
asked for again, with nothing committed. Two things are set for every remote. `verify`: without it a damaged object is restored
under its good md5. Time limits: DVC waits for ever for a server that has stopped answering, and its own limits cover only some servers.
Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from a profile, never from .dvc/config.
"""

import configparser
import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.project.dvc_command import dvc_words, find_reason, read_config, run_dvc
from flows.project.dvc_config import is_secret
from flows.project.dvc_lock import read_lock
from flows.supervise import command as supervise
from flows.supervise.environment import child_environment
from tasks.files.options import parse_options
from tasks.files.words import count_things

LIMIT = 3600.0  # Choice: seconds of one attempt. What it has sent stays sent, so four attempts are four hours of sending.
DELAYS = [30.0, 120.0, 600.0]  # Choice: a restarted server is back by the first, a rebooted machine by the second
CONNECT, READ = 5, 60  # seconds that one request may take to connect, and between two packets
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PORTS = {"s3": 443, "gs": 443, "https": 443, "http": 80, "ssh": 22, "webdav": 80, "webdavs": 443}
HOSTS = {"s3": "s3.amazonaws.com", "gs": "storage.googleapis.com"}  # where the host in the URL is a bucket
FINAL = re.compile(  # another attempt would end the same
    "Unable to locate credentials|bucket does not exist|Access Denied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|requires 'dvc-"
)
Log = Callable[[str], None]


class RemoteAway(RuntimeError):
    """The remote didn't answer, or not in time; it may answer later."""


class RemoteMisconfigured(RuntimeError):
    """A person must change something before another attempt."""


def read_remote(root: Path) -> tuple[str, dict[str, str]]:
    """Return name and options of the default remote, from all of DVC's levels of configuration. Raises RemoteMisconfigured."""
    try:
        config = read_config(root)
    except RuntimeError as error:
        raise RemoteMisconfigured(f"DVC can't read its configuration: {error}") from None
    if not (name := config.get("core.remote")):
        raise RemoteMisconfigured(f"{root} has no DVC remote to hand over through; `cf remote add NAME URL` sets one up")
    prefix = f"remote.{name}."
    return name, {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


def check_remote(root: Path) -> str:
    """Return the remote's name and URL if it is set up as this file says and answers. Raises RemoteAway or RemoteMisconfigured."""
    name, options = read_remote(root)
    url = options.get("url", "")
    if not url:
        raise RemoteMisconfigured(f"core.remote names {name}, which is not set up; `cf remote add {name} URL` does")
    if options.get("verify") != "true":
        way = f"`dvc remote modify {name} verify true`"
        raise RemoteMisconfigured(f"remote {name} doesn't state verify = true, so DVC would take damaged objects for good ones; {way}")
    _refuse_committed_secrets(root)
    shown = re.sub(r"//[^/@]*@", "//", url)  # a person may have written a password into it
    if "://" in url:
        _refuse_silent_host(f"remote {name} ({shown})", url, options.get("endpointurl"))
    elif not (root / ".dvc" / url).is_dir():  # DVC would make it, on the disk below an unmounted share, and call that a push
        raise RemoteAway(f"remote {name} is the folder {url}, which is not there; mount its disk, or make it if it is new")
    return f"{name} ({shown})"


def _refuse_committed_secrets(root: Path) -> None:
    """Raise RemoteMisconfigured for a secret in .dvc/config, which is committed."""
    committed = configparser.ConfigParser(interpolation=None, strict=False)
    committed.read(root / ".dvc/config")
    for section in committed.sections():
        secret = next(filter(is_secret, committed[section]), None)
        if not secret and re.search(r"//[^/@:]*:[^/@]*@", committed[section].get("url", "")):
            secret = "a password in its url"
        if secret:
            raise RemoteMisconfigured(f"{section} holds {secret} in .dvc/config, which is committed; state it in the environment instead")


def _refuse_silent_host(remote: str, url: str, endpoint: str | None) -> None:
    """Raise RemoteAway if the remote's server takes no connection. Behind a proxy only DVC itself can tell."""
    variable = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") if url.startswith("s3://") else None
    address = urlsplit(endpoint or variable or url)
    host, port = HOSTS.get(address.scheme) or address.hostname, address.port or PORTS.get(address.scheme)
    loopback = host in ("127.0.0.1", "::1", "localhost")
    if not host or not port or (urllib.request.getproxies() and not loopback):
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise RemoteAway(f"{remote} doesn't answer at {host}:{port}: {why}; start it, or see to the network") from error


def transfer_outs(verb: str, root: Path, *, targets: Sequence[str] = (), timeout: float = LIMIT, log: Log = lambda _: None) -> None:
    """Push or pull what dvc.lock names, and the run cache, within `timeout` seconds; what is there already is not sent again.

    Push after the stages, or with a short limit: DVC's lock on the checkout is held meanwhile, and a stage that ends waits to be
    recorded. Never pull beside a running stage, because DVC doesn't lock what it replaces; without a dvc.lock use `dvc repro --pull`.
    Raises RemoteAway or RemoteMisconfigured.
    """
    remote, words = check_remote(root), dvc_words(verb, "--run-cache", "--", *targets)
    try:
        code, lines = supervise.run_logged(words, log=log, cwd=root, env=child_environment(), timeout=timeout)
    except TimeoutError:
        why = f"took more than {timeout:g} s for `dvc {verb}`; what was done stays done, and another goes on"
        raise RemoteAway(f"remote {remote} {why}") from None
    if code:
        kind = RemoteMisconfigured if any(map(FINAL.search, lines)) else RemoteAway
        raise kind(f"`dvc {verb}` with remote {remote} failed: {find_reason(lines)}")


push_outs, pull_outs = partial(transfer_outs, "push"), partial(transfer_outs, "pull")


def mend_remote(root: Path) -> list[str]:
    """Remove what dvc.lock names from the remote where its content does not fit its name; return the names (md5s).

    The next push of a machine that has it undamaged sends it. DVC itself only notices the damage (`verify`) and makes the result again
    on every machine: its push sends what is missing, and a damaged object is not missing. Every byte is read, as in a pull.
    """
    from dvc.repo import Repo
    from dvc_objects.errors import ObjectFormatError

    check_remote(root)
    if not (recorded := read_lock(root)):
        raise RemoteMisconfigured(f"{root} has no dvc.lock, which names what is on the remote; run the pipeline first")
    names = sorted({out["md5"] for outs in recorded.values() for out in outs if "md5" in out})
    with Repo(str(root)) as repo, ThreadPoolExecutor(8) as pool:
        remote = repo.cloud.get_remote_odb(command="mend")

        def is_damaged(name: str) -> bool:
            try:
                remote.check(name)  # removes what is damaged
            except ObjectFormatError:
                return True
            except FileNotFoundError:
                pass
            return False

        def find_damaged(names: list[str]) -> set[str]:
            return {name for name, damaged in zip(names, pool.map(is_damaged, names), strict=True) if damaged}

        damaged = find_damaged(names)
        for folder in (name for name in names if name.endswith(".dir") and name not in damaged and remote.exists(name)):
            entries = find_damaged(sorted({entry["md5"] for entry in json.loads(remote.fs.cat_file(remote.oid_to_path(folder)))}))
            if entries:
                damaged |= entries
                remote.fs.remove(remote.oid_to_path(folder))  # while a folder's list is there, DVC believes that its files are
    return sorted(damaged)


def should_retry(task: Any, run: Any, state: Any) -> bool:
    """Say whether a failed push is tried again: not while the run is being stopped, and not where a person must act first."""
    return not supervise.stopping.is_set() and not isinstance(state.result(raise_on_failure=False), RemoteMisconfigured)


RETRIES: dict[str, Any] = {"retries": len(DELAYS), "retry_delay_seconds": DELAYS, "retry_condition_fn": should_retry}


@task(name="push", task_run_name="push", cache_policy=NO_CACHE, **RETRIES)
def push_task(root: Path, timeout: float = LIMIT) -> str:
    """Push as a task of its own, so that a remote which is away never marks a finished stage as failed; ask it for its state."""
    push_outs(root, timeout=timeout, log=get_run_logger().info)
    return "pushed everything"


def add_remote(root: Path, name: str, url: str, *, endpoint: str | None = None, local: bool = False) -> str:
    """Make a remote the default of this checkout, set up as this file says, or replace it; return a sentence. RemoteMisconfigured."""
    if not NAME.fullmatch(name):
        raise RemoteMisconfigured(f"{name!r} can't be the name of a remote; use lower-case letters, digits, - and _, at most 63")
    for address in filter(None, (url, endpoint)):
        if address.startswith("-") or not address.isprintable():
            raise RemoteMisconfigured(f"{address!r} is neither a URL nor a folder")
        parts = urlsplit(address)
        if "://" in address and (parts.password or (parts.username and parts.scheme != "ssh") or parts.query):
            why = "which DVC would write into a file; state them in the environment"
            raise RemoteMisconfigured(f"the remote's URL holds credentials, {why}")
    if endpoint and not url.startswith("s3://"):
        raise RemoteMisconfigured(f"--endpoint is for s3:// remotes, and {url} is none; leave it out")
    if "://" not in url:
        url = str((Path.cwd() / url).resolve())
    options = {"verify": "true"} | ({"endpointurl": endpoint} if endpoint else {})
    if url.startswith(("s3://", "http://", "https://")):
        options |= {"connect_timeout": str(CONNECT), "read_timeout": str(READ)}
    level = ["--local"] if local else []
    try:
        run_dvc(root, "remote", "add", *level, "--force", "--default", name, url)
        for key, value in options.items():
            run_dvc(root, "remote", "modify", *level, name, key, value)
    except RuntimeError as error:
        raise RemoteMisconfigured(str(error)) from None
    return f"remote {name} is {url}, in .dvc/config{'.local' if local else '; commit it'}"


def main(argv: list[str]) -> None:
    args = parse_options("remote", argv, __doc__)
    root = Path.cwd()
    try:
        if args.verb == "add":
            print(add_remote(root, args.name, args.url, endpoint=args.endpoint, local=args.local))
        elif args.verb == "check":
            print(f"{check_remote(root)} is there, and set up right")
        elif args.verb == "mend":
            removed = mend_remote(root)
            way = "; now push from a machine that has them: cf remote push" if removed else ""
            print(f"{count_things(len(removed), 'damaged object')} removed{way}")
        else:
            transfer_outs(args.verb, root, targets=args.targets, timeout=args.timeout, log=print)
    except (RemoteAway, RemoteMisconfigured) as error:
        sys.exit(f"cf remote {args.verb}: {error}")
