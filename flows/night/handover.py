"""What a night made goes to the others: data to the DVC remote, then its branch and tags to origin. What could not go is written down
in .runs/handover.json, and the next night sends it first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from flows.project import dvc_config, dvc_remote, worktree
from flows.project import git as project_git
from flows.project.git import git
from flows.run.stage_task import environment
from flows.supervise import command

WAITING = Path(".runs/handover.json")
TAGS = ("refs/tags/student@*", "refs/tags/student#*")  # of versions and promotions
ASK = 600.0  # Choice: seconds for a fetch, which brings commits and tags alone
KEEP_ONE = "keep one: `git push origin :{0}` deletes it there, `git tag -d {0}` (of a branch: `git branch -D {0}`) here"
OTHERS = "would clobber existing tag|already exists|non-fast-forward|fetch first"  # in git's words
PARTED = re.compile(rf"\[rejected\]\s+(?:\S+\s+->\s+(\S+)\s+)?\((?:{OTHERS})\)")

Line = Callable[[str], None]


def waiting(repo: Path) -> list[str]:
    """Branches that only this machine has, oldest first."""
    try:
        found = json.loads((repo / WAITING).read_text())
    except (OSError, ValueError):
        return []
    return [str(name) for name in found] if isinstance(found, list) else []


def add(repo: Path, branch: str) -> None:
    """Before anything is sent: a machine that dies meanwhile must still know."""
    _write(repo, list(dict.fromkeys([*waiting(repo), branch])))


def send(repo: Path, *, timeout: float, pauses: Sequence[float], line: Line) -> str | None:
    """Everything that waits; or, in one sentence, why it still does."""
    late: dict[str, str] = {}  # branch -> why; it keeps no other back
    for branch in waiting(repo):
        if not git(repo, "for-each-ref", f"refs/heads/{branch}").strip():  # its night died before it had ended
            _write(repo, [name for name in waiting(repo) if name != branch])
            continue
        try:
            if stores(repo):
                _send_data(repo, branch, timeout, pauses)
            if "origin" in git(repo, "remote").split():
                _push(repo, [f"refs/heads/{branch}", *_tags(repo, without=late)], timeout, line)
        except (dvc_remote.Away, dvc_remote.Misconfigured, RuntimeError) as error:
            late[branch] = " ".join(str(error).split())
            pauses = []  # a remote that is away is asked once for each of the others, and no more
            continue
        _write(repo, [name for name in waiting(repo) if name != branch])
        line(f"handed over {branch}")
    return f"{', '.join(late)} could not be handed over: {'; '.join(dict.fromkeys(late.values()))}" if late else None


def stores(repo: Path) -> bool:
    """Whether a DVC remote is named at all. A project without one keeps everything in its cache."""
    try:
        dvc_remote.settings(repo)
    except dvc_remote.Misconfigured as error:
        return "has no DVC remote" not in str(error)  # anything else is said when it is tried
    return True


def _send_data(repo: Path, branch: str, timeout: float, pauses: Sequence[float]) -> None:
    """From a checkout of the night's commit: DVC sends what its dvc.lock names, and the run cache."""
    folder = repo / worktree.FOLDER / "handover"
    with suppress(RuntimeError):
        git(repo, "worktree", "remove", "--force", str(folder))
    git(repo, "worktree", "prune")
    git(repo, "worktree", "add", "--quiet", "--detach", str(folder), f"refs/heads/{branch}")
    try:
        dvc_config.share(repo, folder)
        again = dvc_remote.pushed.with_options(task_run_name=f"push {branch}", retries=len(pauses), retry_delay_seconds=list(pauses) or 0)
        again(folder, timeout=timeout)
    finally:
        git(repo, "worktree", "remove", "--force", str(folder))


def _tags(repo: Path, without: Iterable[str]) -> list[str]:
    """But for those of students whose data is not at the remote yet."""
    tips = {git(repo, "rev-parse", f"refs/heads/{branch}").strip() for branch in without}
    listed = git(repo, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", *TAGS).splitlines()
    return [row.split()[0] for row in listed if row.split()[-1] not in tips]


def _push(repo: Path, refs: list[str], timeout: float, line: Line) -> None:
    _origin(repo, ["push", "--porcelain", "origin", *(f"{ref}:{ref}" for ref in refs)], timeout)
    line(f"pushed {refs[0]} and tags to origin")


def catch_up(repo: Path, line: Line) -> None:
    """The same, for a night that goes on without it."""
    try:
        fetch(repo)
    except RuntimeError as error:
        line(f"the night goes by what is here: {error}")


def fetch(repo: Path, timeout: float = ASK) -> None:
    """What others made: branches, nights and tags. Nothing here is changed by it."""
    if "origin" in git(repo, "remote").split():
        _origin(repo, ["fetch", "--tags", "origin", "+refs/heads/*:refs/remotes/origin/*"], timeout)


def _origin(repo: Path, words: list[str], timeout: float) -> None:
    """Git waits for ever for a server that has stopped answering."""
    said: list[str] = []
    surroundings = {**environment("nightly", repo, repo), "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        code = command.run([*project_git.PLAIN, *words], cwd=repo, env=surroundings, line=said.append, timeout=timeout)
    except TimeoutError as error:
        raise RuntimeError(f"`git {words[0]}` {error}") from None
    if code:
        if parted := [name for text in said if (name := _parted(text))]:
            raise RuntimeError(f"origin has another {', another '.join(parted)}; {KEEP_ONE.format(parted[0])}")
        raise RuntimeError(f"`git {words[0]}` with origin failed: {' '.join(text for text in said if text.strip())[:300]}")


def _parted(text: str) -> str | None:
    """The branch or tag of a line in which git says that origin's is another one."""
    if not (found := PARTED.search(text)):
        return None
    pushed = re.match(r"!\t\S+:refs/(?:heads|tags)/(\S+)\t", text)
    return pushed[1] if pushed else found[1]


def _write(repo: Path, names: list[str]) -> None:
    path = repo / WAITING
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(names) + "\n")
    partial.replace(path)
