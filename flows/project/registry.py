"""Which students exist and which is promoted: annotated git tags in GTO's format, so git is the registry.

student@v0.0.1 is a version: a commit whose dvc.lock names the weights. student#promoted#1 promotes the version of its commit; the
highest number holds. No tag is ever removed: a rollback promotes an older version once more. A tag's message is JSON: md5, numbers of
the gate, runs. `gto show` and `gto history` read the same tags.

GTO's own API does not write them, because it gives a tag no date and orders tags by seconds: of two promotions within a second it shows
the older. It also takes four seconds to import.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from flows.project.dvc_command import run_dvc
from flows.project.dvc_lock import describe_damage, find_out
from flows.project.git import identity_options, resolve_commit, run_git
from tasks.files.atomic import delete_path, swap_into_place
from tasks.files.hashes import compute_dvc_md5

ARTIFACT, STAGE, WEIGHTS = "student", "promoted", "models/stage2"
VERSION = re.compile(r"v\d{1,6}\.\d{1,6}\.\d{1,6}")
VERSION_TAG = re.compile(rf"{ARTIFACT}@({VERSION.pattern})")
PROMOTION_TAG = re.compile(rf"{ARTIFACT}#{STAGE}#(\d{{1,9}})")
FIELDS = ("refname:strip=2", "*objectname", "taggerdate:unix", "contents")


@dataclass(frozen=True)
class Version:
    """A student that was registered."""

    name: str  # v0.0.1
    commit: str
    when: int  # seconds since 1970
    about: Mapping[str, Any]  # the tag's message

    @property
    def tag(self) -> str:
        return f"{ARTIFACT}@{self.name}"


@dataclass(frozen=True)
class Assignment:
    """A promotion of a version, or a rollback to it."""

    number: int
    version: Version
    when: int  # seconds since 1970
    about: Mapping[str, Any]  # the tag's message

    @property
    def tag(self) -> str:
        return f"{ARTIFACT}#{STAGE}#{self.number}"


def list_versions(repo: Path) -> list[Version]:
    """Return all versions, lowest first. A lightweight tag is no version, because it has neither date nor message."""
    return [Version(name, commit, when, about) for name, commit, when, about in _read_tags(repo, VERSION_TAG) if when]


def list_assignments(repo: Path) -> list[Assignment]:
    """Return all promotions in their order. A tag at a commit that is no version is no promotion."""
    known = {version.commit: version for version in list_versions(repo)}
    tags = _read_tags(repo, PROMOTION_TAG)
    return [Assignment(int(number), known[commit], when, about) for number, commit, when, about in tags if commit in known]


def find_promoted(repo: Path) -> Version | None:
    """Return the promoted version; None before the first promotion."""
    assignments = list_assignments(repo)
    return assignments[-1].version if assignments else None


def find_version(repo: Path, name: str) -> Version:
    """Return a version by its name. Raises ValueError for what is no version's name, and for a version that does not exist."""
    if not VERSION.fullmatch(name):
        raise ValueError(f"{name!r} is no version; versions are called v0.0.1")
    versions = {version.name: version for version in list_versions(repo)}
    if name not in versions:
        raise ValueError(f"there is no {ARTIFACT}@{name}; known are {', '.join(versions) or 'none yet'}")
    return versions[name]


def _read_tags(repo: Path, pattern: re.Pattern[str]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Return the pattern's group, commit, date and message of all tags that fit it, lowest number first.

    A lightweight tag has an empty commit and the date 0.
    """
    form = "%00".join(f"%({field})" for field in FIELDS) + "%01"
    rows = run_git(repo, "for-each-ref", f"--format={form}", "refs/tags").split("\1")
    fields = [[*row.strip("\n").split("\0"), "", "", ""][:4] for row in rows]
    found = [(pattern.fullmatch(name), commit, when, text) for name, commit, when, text in fields]
    tags = [(match[1], commit, int(when or 0), _parse_message(text)) for match, commit, when, text in found if match]
    return sorted(tags, key=lambda tag: _find_numbers(tag[0]))


def _parse_message(message: str) -> dict[str, Any]:
    """Parse a tag's message; the text of a tag that a person or `gto` made becomes the key `said`."""
    try:
        about = json.loads(message)
    except ValueError:
        about = None
    return about if isinstance(about, dict) else {"said": message.strip()}


def _find_numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def lock_registry(repo: Path) -> BaseFileLock:
    """Return the lock of all worktrees of the checkout, to hold from reading what is promoted until a tag is made."""
    folder = Path(run_git(repo, "rev-parse", "--path-format=absolute", "--git-common-dir").strip())
    return FileLock(folder / "cf-registry.lock")


def register_version(repo: Path, commit: str, about: dict[str, Any]) -> Version:
    """Register a commit's student as the next version, or return the version that it already is.

    Numbers of lightweight tags are left out. Raises ValueError for a commit whose dvc.lock names no weights.
    """
    commit = resolve_commit(repo, commit)
    for version in list_versions(repo):
        if version.commit == commit:
            return version
    weights = find_out(repo, commit, WEIGHTS)
    *above, last = max((_find_numbers(name) for name, *_ in _read_tags(repo, VERSION_TAG)), default=[0, 0, 0])
    name = "v" + ".".join(map(str, [*above, last + 1]))
    _create_tag(repo, f"{ARTIFACT}@{name}", commit, {"path": WEIGHTS, "md5": weights["md5"]} | about)
    return find_version(repo, name)


def assign_version(repo: Path, version: Version, about: dict[str, Any]) -> Assignment:
    """Promote a version."""
    number = max((int(number) for number, *_ in _read_tags(repo, PROMOTION_TAG)), default=0) + 1
    _create_tag(repo, f"{ARTIFACT}#{STAGE}#{number}", version.commit, {"version": version.name} | about)
    return list_assignments(repo)[-1]


def roll_back(repo: Path, name: str | None, why: str) -> Assignment:
    """Promote a version that was promoted before: `name`, or the version that was promoted just before the promoted one first was.

    So a second rollback goes further back, and not forth again. Raises ValueError where there is no such version.
    """
    past = [assignment.version for assignment in list_assignments(repo)]
    if not past:
        raise ValueError("no student was ever promoted, so there is none to go back to")
    now = past[-1]
    earlier = list(dict.fromkeys(version.name for version in past if version != now))
    if name is None and not earlier:
        raise ValueError(f"{now.name} is the only student that was ever promoted, so there is none to go back to")
    first = past.index(now)
    if name is None and not first:
        raise ValueError(f"{now.name} was the first to be promoted; name the version to go to: {', '.join(earlier)}")
    target = find_version(repo, name) if name else past[first - 1]
    if target == now:
        raise ValueError(f"{target.name} is the promoted one already")
    if target.name not in earlier:
        raise ValueError(f"{target.name} was never promoted, so going there is no rollback; `cf promote {target.name}` promotes it")
    return assign_version(repo, target, {"rollback": True, "from": now.name, "why": why})


def _create_tag(repo: Path, name: str, commit: str, about: Mapping[str, Any]) -> None:
    """Tag a commit. Git refuses a name that exists, so of two processes at once the second fails.

    The tag is dated at least a second after the last one, because GTO orders tags by seconds.
    """
    last = max((when for pattern in (VERSION_TAG, PROMOTION_TAG) for _, _, when, _ in _read_tags(repo, pattern)), default=0)
    message = json.dumps(about, sort_keys=True, ensure_ascii=False)
    options = ["--annotate", "--no-sign", "--cleanup=verbatim", "--message", message]
    date = f"{max(int(time.time()), last + 1)} +0000"
    try:
        run_git(repo, *identity_options(repo), "tag", *options, "--", name, commit, GIT_COMMITTER_DATE=date)
    except RuntimeError as error:
        raise RuntimeError(f"the tag {name} could not be made: {error}") from None


def fetch_weights(repo: Path, version: Version, out: Path) -> None:
    """Make `out` a version's weights, from the cache or the remote, compared with the md5 of its dvc.lock before they take its place.

    What is at `out` is replaced where it is another version's weights. Raises ValueError where it is anything else, and RuntimeError
    for weights that can't be had or are damaged; `out` is then as it was.
    """
    weights, out = find_out(repo, version.commit, WEIGHTS), out.resolve()
    there = compute_dvc_md5(out, again=True) if out.is_file() or (out.is_dir() and any(out.iterdir())) else ""
    if there == weights["md5"]:
        return
    if there and there not in [known.about.get("md5") for known in list_versions(repo)]:
        raise ValueError(f"{out} holds something else than a version's weights; delete it, or name another folder")
    new = out.with_name(f"{out.name}.partial")
    delete_path(new)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_dvc(repo, "get", "--rev", version.tag, "--out", str(new), str(repo), WEIGHTS)
        if problem := describe_damage(new, weights):
            raise RuntimeError(f"they are not what its dvc.lock says: {problem}")
        swap_into_place(new, out)
    except RuntimeError as error:
        way = f"`cf runs open {version.tag} DIR` and `dvc repro` there make them again"
        raise RuntimeError(f"the weights of {version.tag} could not be had: {error}; {way}") from None
    finally:
        delete_path(new)
