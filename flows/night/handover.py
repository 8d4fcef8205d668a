"""Handing over: what a night made goes to the DVC remote, then its branch and tags go to origin.

Branches that could not go are noted in .runs/handover.json, and the next night sends them first.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from flows.project import dvc_config, dvc_remote, worktree
from flows.project.dvc_command import read_config
from flows.project.git import PLAIN, run_git
from flows.supervise.command import run_logged
from flows.supervise.environment import child_environment
from tasks.files.json_lines import write_json

WAITING_FILE = Path(".runs/handover.json")
TAGS = ("refs/tags/student@*", "refs/tags/student#*")  # of versions and promotions
FETCH_TIMEOUT = 600.0  # Choice: seconds for a fetch, which brings commits and tags alone
WAY_OUT = "keep one: `git push origin :{0}` deletes it there, `git tag -d {0}` (of a branch: `git branch -D {0}`) here"
REJECTIONS = "would clobber existing tag|already exists|non-fast-forward|fetch first"  # in git's words
# a line about a branch or tag that is another one at origin: of a push, which names it first, or of a fetch, which names it last
CONFLICT = re.compile(rf"(?:!\t\S+:refs/(?:heads|tags)/(\S+)\t)?\[rejected\]\s+(?:\S+\s+->\s+(\S+)\s+)?\((?:{REJECTIONS})\)")


def waiting_branches(repo: Path) -> list[str]:
    """Return the branches that only this machine has, oldest first."""
    with suppress(OSError, ValueError, TypeError):
        return [str(name) for name in json.loads((repo / WAITING_FILE).read_text())]
    return []


def add_waiting(repo: Path, branch: str) -> None:
    """Note a branch before anything of it is sent, so that a machine that dies meanwhile still knows of it."""
    write_json(repo / WAITING_FILE, list(dict.fromkeys([*waiting_branches(repo), branch])))


def send_waiting(repo: Path, *, timeout: float, pauses: Sequence[float], log: Callable[[str], None]) -> str | None:
    """Send every waiting branch with its data and tags; return one sentence if some still wait. A failed branch holds up no other.

    `timeout` (seconds) limits each transfer; a failed push of data is tried again after each of `pauses` (seconds).
    """
    late: dict[str, str] = {}  # branch -> why
    for branch in waiting_branches(repo):
        if run_git(repo, "for-each-ref", f"refs/heads/{branch}").strip():  # else its night died before it had ended
            try:
                if read_config(repo).get("core.remote"):  # a project without a remote keeps everything in its cache
                    _send_data(repo, branch, timeout, pauses)
                if "origin" in run_git(repo, "remote").split():
                    refs = [f"refs/heads/{branch}", *_tags_to_push(repo, without=late)]
                    _run_with_origin(repo, ["push", "--porcelain", "origin", *(f"{ref}:{ref}" for ref in refs)], timeout)
                    log(f"pushed {refs[0]} and tags to origin")
            except RuntimeError as error:  # dvc_remote's errors are RuntimeErrors too
                late[branch] = " ".join(str(error).split())
                pauses = []  # a remote that does not answer is asked once for each further branch, and not again
                continue
            log(f"handed over {branch}")
        write_json(repo / WAITING_FILE, [name for name in waiting_branches(repo) if name != branch])
    return f"{', '.join(late)} could not be handed over: {'; '.join(dict.fromkeys(late.values()))}" if late else None


def _send_data(repo: Path, branch: str, timeout: float, pauses: Sequence[float]) -> None:
    """Push what the branch's dvc.lock names, and the run cache, from a checkout of the branch."""
    folder = repo / worktree.FOLDER / "handover"
    with suppress(RuntimeError):
        run_git(repo, "worktree", "remove", "--force", str(folder))
    run_git(repo, "worktree", "prune")
    run_git(repo, "worktree", "add", "--quiet", "--detach", str(folder), f"refs/heads/{branch}")
    try:
        dvc_config.share_cache(repo, folder)
        push = dvc_remote.push_task.with_options(task_run_name=f"push {branch}", retries=len(pauses), retry_delay_seconds=list(pauses) or 0)
        push(folder, timeout=timeout)
    finally:
        run_git(repo, "worktree", "remove", "--force", str(folder))


def _tags_to_push(repo: Path, without: Iterable[str]) -> list[str]:
    """Return all tags of versions and promotions but those of the branches in `without`, whose data is not at the remote yet."""
    tips = {run_git(repo, "rev-parse", f"refs/heads/{branch}").strip() for branch in without}
    listed = run_git(repo, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", *TAGS).splitlines()
    return [row.split()[0] for row in listed if row.split()[-1] not in tips]


def try_fetch(repo: Path, log: Callable[[str], None]) -> None:
    """Fetch from origin; a night goes on without it."""
    try:
        fetch_origin(repo)
    except RuntimeError as error:
        log(f"the night goes by what is here: {error}")


def fetch_origin(repo: Path, timeout: float = FETCH_TIMEOUT) -> None:
    """Fetch branches, nights and tags that others made, if there is an origin. No branch of this checkout changes."""
    if "origin" in run_git(repo, "remote").split():
        _run_with_origin(repo, ["fetch", "--tags", "origin", "+refs/heads/*:refs/remotes/origin/*"], timeout)


def _run_with_origin(repo: Path, words: list[str], timeout: float) -> None:
    """Run git with a time limit, because git waits for ever for a server that stops answering. Raises RuntimeError, one sentence."""
    variables = {**child_environment(), "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        code, lines = run_logged([*PLAIN, *words], log=lambda _: None, cwd=repo, env=variables, timeout=timeout)
    except TimeoutError as error:
        raise RuntimeError(f"`git {words[0]}` {error}") from None
    if code:
        if refs := [pushed or fetched for line in lines for pushed, fetched in CONFLICT.findall(line) if pushed or fetched]:
            raise RuntimeError(f"origin has another {', another '.join(refs)}; {WAY_OUT.format(refs[0])}")
        raise RuntimeError(f"`git {words[0]}` with origin failed: {' '.join(lines)[:300]}")
