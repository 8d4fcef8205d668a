"""A checkout of its own for every run: .runs/<name>, on branch run/<name>, with the parameters that the run was asked for.

All of them share the DVC cache of the checkout they come from, else nothing would ever be restored. The branch stays and the run
can be repeated from it by `dvc repro`; the folder goes when it is old (`python -m flows.project.worktree prune`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.project import dvc_config
from flows.project import overrides as laid
from flows.project.git import commit_paths, run_git
from flows.project.run_lock import is_in_use

FOLDER = ".runs"
KEEP = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
EXAMPLES = """examples:
  python -m flows.project.worktree list
  python -m flows.project.worktree prune --keep 5     every finished run's folder but the five youngest; branches stay"""


def check_run_name(name: str) -> str:
    """A name that is one folder, one git branch and one word to a shell, or ValueError."""
    if not NAME.fullmatch(name) or ".." in name or name.endswith(".lock"):
        rule = "lower-case letters, digits, and . _ - between them, at most 100, without .. and not ending in .lock"
        raise ValueError(f"{name!r} can't be the name of a run; use {rule}")
    return name


def make_worktree(
    repo: Path, name: str, *, base: str = "HEAD", profile: str | None, overrides: Mapping[str, Any], branch: str | None = None
) -> Path:
    """The folder, with its parameters committed. One that is already there is taken as it is: a run that is retried finds its
    working files, and its training goes on from the last checkpoint."""
    repo, name = repo.resolve(), check_run_name(name)
    branch, folder = branch or f"run/{name}", repo / FOLDER / name
    if not (folder / ".git").is_file():  # absent, or half made: there git would speak of the checkout around it
        shutil.rmtree(folder, ignore_errors=True)
        run_git(repo, "worktree", "prune")
        start = run_git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip()
        known = run_git(repo, "branch", "--list", branch).strip()
        run_git(repo, "worktree", "add", "--quiet", *([] if known else ["-b", branch]), str(folder), branch if known else start)
    # a kill in the middle of the checkout leaves files away; DVC takes metrics away itself, before it runs their stage
    elif away := [file for file in run_git(folder, "ls-files", "-z", "--deleted").split("\0") if file and not file.startswith("metrics/")]:
        run_git(folder, "checkout", "--quiet", "--", *away)
    os.utime(folder)
    dvc_config.share_cache(repo, folder)
    try:
        if profile and profile != "params.yaml":
            _use_profile(folder, "profile", "use", profile)
        if overrides:
            laid.apply_overrides(folder / "params.yaml", overrides)
    except (RuntimeError, ValueError):
        run_git(folder, "checkout", "--quiet", "--", "params.yaml")
        raise
    said = [f"profile {profile or 'params.yaml'}", *(f"{key}={value}" for key, value in overrides.items())]
    commit_paths(folder, ["params.yaml"], f"run {name}: {', '.join(said)}")
    return folder


def _use_profile(folder: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tasks", *words], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or f"`cf {' '.join(words)}` failed").splitlines()[-1])


# --------------------------------------------------------------------------------------------------- whose turn it is


# ---------------------------------------------------------------------------------------------------------- old ones


def list_worktrees(repo: Path) -> list[Path]:
    """Folders of runs, youngest first."""
    known = {path: path.stat().st_mtime for path in (repo / FOLDER).glob("*") if (path / ".git").is_file()}
    return sorted(known, key=lambda path: -known[path])


def prune_worktrees(repo: Path, keep: int = KEEP, line: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Removes the folders of all runs but the `keep` youngest, never one in use. What a run that died had finished is committed
    first: the branch must be enough to repeat it. What git can't remove stays, and doesn't end the run that tidies up."""
    gone = []
    for folder in list_worktrees(repo)[keep:]:
        if is_in_use(folder):
            continue
        try:
            run_git(folder, "add", "--update")
            commit_paths(folder, ["dvc.lock", "metrics"], f"run {folder.name}: what it had finished")
            run_git(repo, "worktree", "remove", "--force", str(folder))
            gone.append(folder)
        except RuntimeError as error:
            line(f"{folder.name} was not removed: {error}")
    return gone


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m flows.project.worktree", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="runs that have a folder, youngest first")
    verbs.add_parser("prune", help="remove old folders").add_argument("--keep", type=int, default=KEEP)
    args = parser.parse_args(argv)
    repo = Path.cwd()
    if args.verb == "list":
        if not list_worktrees(repo):
            print(f"no run has a folder in {FOLDER}/")
        for folder in list_worktrees(repo):
            print(f"{folder.name:<40} {'running' if is_in_use(folder) else 'finished':<9} {_describe_commit(folder)}")
        return
    for folder in prune_worktrees(repo, args.keep, print):
        print(f"removed {folder}; its branch run/{folder.name} stays")


def _describe_commit(folder: Path) -> str:
    try:
        return run_git(folder, "log", "-1", "--format=%h %s").strip()
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1:])
