"""Which students there are and which one is promoted: annotated git tags in GTO's format, so git is the registry.

student@v0.0.1 is a version: a commit whose dvc.lock names the weights. student#promoted#1 says of a version's commit that from then
on it is the promoted one; the highest number holds. Nothing is ever taken back: a rollback is one more assignment, of an older
version. A tag's message is JSON: md5, numbers of the gate, runs. `gto show` and `gto history` read the same tags.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.project.dvc_lock import describe_damage, find_out
from flows.project.git import identity_options, resolve_commit, run_git

ARTIFACT, STAGE, WEIGHTS = "student", "promoted", "models/stage2"
VERSION = re.compile(r"v\d{1,6}\.\d{1,6}\.\d{1,6}")
REGISTERED = re.compile(rf"{ARTIFACT}@({VERSION.pattern})")
ASSIGNED = re.compile(rf"{ARTIFACT}#{STAGE}#(\d{{1,9}})")
FIELDS = ("refname:strip=2", "*objectname", "taggerdate:unix", "contents")


@dataclass(frozen=True)
class Version:
    name: str  # v0.0.1
    commit: str
    when: int
    about: Mapping[str, Any]

    @property
    def tag(self) -> str:
        return f"{ARTIFACT}@{self.name}"


@dataclass(frozen=True)
class Assignment:
    number: int
    version: Version
    when: int
    about: Mapping[str, Any]

    @property
    def tag(self) -> str:
        return f"{ARTIFACT}#{STAGE}#{self.number}"


# ---------------------------------------------------------------------------------------------------------- reading


def list_versions(repo: Path) -> list[Version]:
    """Oldest first."""
    found = [Version(match[1], commit, when, about) for match, commit, when, about in _read_tags(repo, REGISTERED)]
    return sorted(found, key=lambda one: _version_key(one.name))


def list_assignments(repo: Path) -> list[Assignment]:
    """In their order. One of a commit that is no version is no assignment."""
    known = {one.commit: one for one in list_versions(repo)}
    found = [Assignment(int(m[1]), known[commit], when, about) for m, commit, when, about in _read_tags(repo, ASSIGNED) if commit in known]
    return sorted(found, key=lambda one: one.number)


def find_promoted(repo: Path) -> Version | None:
    last = list_assignments(repo)[-1:]
    return last[0].version if last else None


def find_version(repo: Path, name: str) -> Version:
    if not VERSION.fullmatch(name):
        raise ValueError(f"{name!r} is no version; versions are called v0.0.1")
    for one in list_versions(repo):
        if one.name == name:
            return one
    known = ", ".join(one.name for one in list_versions(repo)) or "none yet"
    raise ValueError(f"there is no {ARTIFACT}@{name}; known are {known}")


def _read_tags(repo: Path, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], str, int, dict[str, Any]]]:
    form = "%00".join(f"%({field})" for field in FIELDS) + "%01"
    found = []
    for row in run_git(repo, "for-each-ref", f"--format={form}", "refs/tags").split("\1"):
        name, commit, when, message = [*row.strip("\n").split("\0"), "", "", ""][:4]
        if (match := pattern.fullmatch(name)) and commit and when:  # a lightweight tag has neither
            found.append((match, commit, int(when), _parse_message(message)))
    return found


def _parse_message(message: str) -> dict[str, Any]:
    """Also of tags that a person or `gto` made."""
    try:
        about = json.loads(message)
    except ValueError:
        about = None
    return about if isinstance(about, dict) else {"said": message.strip()}


def _list_taken(repo: Path, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """All tags of that name, also those that say nothing: their numbers can't be had again."""
    names = run_git(repo, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags").splitlines()
    return [match for name in names if (match := pattern.fullmatch(name))]


def _version_key(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.removeprefix("v").split(".")))


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def lock_registry(repo: Path) -> Iterator[None]:
    """Between reading what is promoted and tagging, nobody else tags: of all worktrees of the checkout. Freed by the kernel."""
    folder = Path(run_git(repo, "rev-parse", "--path-format=absolute", "--git-common-dir").strip())
    with (folder / "cf-registry.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def register_version(repo: Path, commit: str, about: dict[str, Any]) -> Version:
    """The commit's student as the next version; the one it is already, if it is."""
    commit = resolve_commit(repo, commit)
    for one in list_versions(repo):
        if one.commit == commit:
            return one
    weights = find_out(repo, commit, WEIGHTS)
    *above, last = max((_version_key(match[1]) for match in _list_taken(repo, REGISTERED)), default=(0, 0, 0))
    name = "v" + ".".join(map(str, [*above, last + 1]))
    _create_tag(repo, f"{ARTIFACT}@{name}", commit, {"path": WEIGHTS, "md5": weights["md5"]} | about)
    return find_version(repo, name)


def assign_version(repo: Path, version: Version, about: dict[str, Any]) -> Assignment:
    number = max((int(match[1]) for match in _list_taken(repo, ASSIGNED)), default=0) + 1
    _create_tag(repo, f"{ARTIFACT}#{STAGE}#{number}", version.commit, {"version": version.name} | about)
    return list_assignments(repo)[-1]


def roll_back(repo: Path, name: str | None, why: str) -> Assignment:
    """To a version that was promoted before: the one named, or what the promoted one took the place of when it first was promoted:
    so a second rollback goes further back, and not forth again."""
    past = list_assignments(repo)
    if not past:
        raise ValueError("no student was ever promoted, so there is none to go back to")
    now = past[-1].version
    before = [one.version for one in past if one.version != now]
    if name is None and not before:
        raise ValueError(f"{now.name} is the only student that was ever promoted, so there is none to go back to")
    first = next(place for place, one in enumerate(past) if one.version == now)
    if name is None and not first:
        known = ", ".join(dict.fromkeys(one.name for one in before))
        raise ValueError(f"{now.name} was the first to be promoted; name the version to go to: {known}")
    target = find_version(repo, name) if name else past[first - 1].version
    if target == now:
        raise ValueError(f"{target.name} is the promoted one already")
    if target not in before:
        raise ValueError(f"{target.name} was never promoted, so going there is no rollback; `cf promote {target.name}` promotes it")
    return assign_version(repo, target, {"rollback": True, "from": now.name, "why": why})


def _create_tag(repo: Path, name: str, commit: str, about: Mapping[str, Any]) -> None:
    """git refuses a name that is taken: of two at once, one fails. A second later than the last one: GTO sorts by seconds."""
    last = max([0, *(one.when for one in list_versions(repo)), *(one.when for one in list_assignments(repo))])
    date = f"{max(int(time.time()), last + 1)} +0000"
    message = json.dumps(about, sort_keys=True, ensure_ascii=False)
    words = ["git", *identity_options(repo), "tag", "--annotate", "--no-sign", "--cleanup=verbatim", "--message", message, "--", name, commit]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_COMMITTER_DATE": date}
    done = subprocess.run(words, cwd=repo, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the tag {name} could not be made: {' '.join(done.stderr.split())}")


def fetch_weights(repo: Path, version: Version, out: Path) -> None:
    """A version's weights, by its tag. They are compared with the md5 that its dvc.lock states."""
    weights = find_out(repo, version.commit, WEIGHTS)
    words = [sys.executable, "-m", "dvc", "get", "--rev", version.tag, "--out", str(out), str(repo), WEIGHTS]
    done = subprocess.run(words, cwd=repo, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the weights of {version.tag} could not be had: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    if problem := describe_damage(out, weights):
        raise RuntimeError(f"the weights of {version.tag} are not what its dvc.lock says: {problem}; delete {out}")
