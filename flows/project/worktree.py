"""Every run of the pipeline has its own git worktree in .runs/NAME on branch run/NAME, and its parameters are committed there.

All worktrees use the DVC cache of the main checkout, so that a result of one run is not computed again by another. `cf runs prune`
removes the folders of all runs but the most recently used; the branches stay, and `cf runs open` makes a folder of one again.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.cli import one_line_errors
from flows.project import dvc_config
from flows.project.dvc_command import run_dvc
from flows.project.git import commit_paths, resolve_commit, run_git
from flows.project.overrides import apply_overrides
from flows.project.run_lock import is_in_use
from tasks.files.options import parse_options

FOLDER = ".runs"
KEEP = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")


def check_run_name(name: str) -> str:
    """Return `name` if it is valid as a folder name, as a git branch and as a shell word without quotes; else raise ValueError."""
    if not NAME.fullmatch(name) or ".." in name or name.endswith(".lock"):
        rule = "lower-case letters, digits, and . _ - between them, at most 100, without .. and not ending in .lock"
        raise ValueError(f"{name!r} can't be the name of a run; use {rule}")
    return name


def make_worktree(repo: Path, name: str, *, base: str = "HEAD", profile: str | None, overrides: Mapping[str, Any]) -> Path:
    """Create the worktree of a run on branch run/NAME from `base`, and commit its parameters; return its folder.

    A worktree that exists is used again, because a run that is tried again continues from its last checkpoint: tracked files that are
    missing are restored, except metrics, and profile and overrides are applied again. If the branch exists, it is used and not `base`.
    An invalid name raises ValueError, an invalid profile or value ValueError or RuntimeError; params.yaml is then as last committed.
    """
    repo, name = repo.resolve(), check_run_name(name)
    branch, folder = f"run/{name}", repo / FOLDER / name
    if not (folder / ".git").is_file():  # absent, or half made: in such a folder git would act on the checkout around it
        shutil.rmtree(folder, ignore_errors=True)
        run_git(repo, "worktree", "prune")
        start = run_git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip()
        known = run_git(repo, "branch", "--list", branch).strip()
        run_git(repo, "worktree", "add", "--quiet", *([] if known else ["-b", branch]), str(folder), branch if known else start)
    else:  # A checkout that was killed lacks files. A missing metrics file is none of them: DVC deletes it before it runs the stage.
        missing = [file for file in run_git(folder, "ls-files", "-z", "--deleted").split("\0") if not file.startswith("metrics/")]
        if any(missing):
            run_git(folder, "checkout", "--quiet", "--", *filter(None, missing))
    os.utime(folder)  # marks the folder as just used, by which `list_worktrees` sorts
    dvc_config.share_cache(repo, folder)
    try:
        if profile and profile != "params.yaml":
            _use_profile(folder, profile)
        if overrides:
            apply_overrides(folder / "params.yaml", overrides)
    except (RuntimeError, ValueError):
        run_git(folder, "checkout", "--quiet", "--", "params.yaml")
        raise
    values = [f"profile {profile or 'params.yaml'}", *(f"{key}={value}" for key, value in overrides.items())]
    commit_paths(folder, ["params.yaml"], f"run {name}: {', '.join(values)}")
    return folder


def open_worktree(repo: Path, name: str, folder: Path) -> str:
    """Make a worktree of a run's branch, or of any commit, that shares the cache of `repo`, with its outs; return what there is to say.

    It is on no branch, because the run's own folder may have that one. Without the cache all stages would run again.
    Raises ValueError for a folder that exists, and for what is neither a run nor a commit.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name a folder that is not")
    branch = run_git(repo, "branch", "--list", "--format=%(refname)", f"run/{name}").strip() if NAME.fullmatch(name) else ""
    try:
        commit = resolve_commit(repo, branch or name)
    except ValueError:
        raise ValueError(f"{name} is neither a run nor a branch, tag or commit; `git branch --list 'run/*'` lists all runs") from None
    run_git(repo, "worktree", "add", "--quiet", "--detach", str(folder.absolute()), commit)
    dvc_config.share_cache(repo.resolve(), folder)
    try:
        run_dvc(folder, "checkout")
        outs = "with all that its stages made; `dvc repro` there trains nothing until you change something"
    except RuntimeError as error:
        outs = f"not with all that its stages made: {error}; `dvc pull` there brings what the remote has, `dvc repro` makes the rest"
    return f"{folder} is {name} at {commit[:12]}, {outs}. `git switch -c NAME` before you commit; `git worktree remove {folder}` ends it"


def _use_profile(folder: Path, profile: str) -> None:
    """Run `cf profile use` with the worktree's own code. Raises RuntimeError with the last line of its output if it fails."""
    words = [sys.executable, "-m", "tasks", "profile", "use", profile]
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "`cf profile` failed").splitlines()[-1])


def list_worktrees(repo: Path) -> list[Path]:
    """Return the folders of runs, the most recently used first."""
    folders = [path for path in (repo / FOLDER).glob("*") if (path / ".git").is_file()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def prune_worktrees(repo: Path, keep: int = KEEP, line: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Remove the folders of all runs but the `keep` most recently used and those in use; return the removed ones.

    dvc.lock and metrics are committed before, because a run that was killed has not committed the stages that it finished, and its
    branch alone must be enough to repeat it. Files that git does not track are deleted with the folder. If git can't remove a folder,
    it stays and `line` is called with the reason, because a clean-up that fails must not stop the caller.
    """
    removed = []
    for folder in list_worktrees(repo)[keep:]:
        if is_in_use(folder):
            continue
        try:
            run_git(folder, "add", "--update")
            commit_paths(folder, ["dvc.lock", "metrics"], f"run {folder.name}: what it had finished")
            run_git(repo, "worktree", "remove", "--force", str(folder))
            removed.append(folder)
        except RuntimeError as error:
            line(f"{folder.name} was not removed: {error}")
    return removed


@one_line_errors
def main(argv: list[str]) -> None:
    """Run `cf runs list` or `cf runs prune` in the current folder, a checkout's root."""
    args = parse_options("runs", argv, __doc__)
    repo = Path.cwd()
    if args.verb == "open":
        print(open_worktree(repo, args.name, args.folder))
        return
    if args.verb == "list":
        if not list_worktrees(repo):
            print(f"no run has a folder in {FOLDER}/")
        for folder in list_worktrees(repo):
            print(f"{folder.name:<40} {'running' if is_in_use(folder) else 'not running':<12} {_describe_commit(folder)}")
        return
    for folder in prune_worktrees(repo, args.keep, print):
        print(f"removed {folder}; its branch run/{folder.name} stays")


def _describe_commit(folder: Path) -> str:
    """Return hash and subject of the newest commit, or git's error, because one damaged folder must not hide the others."""
    try:
        return run_git(folder, "log", "-1", "--format=%h %s").strip()
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1:])
