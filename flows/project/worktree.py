"""A git worktree for every run: .runs/NAME, on branch run/NAME, with the run's parameters committed.

All worktrees share the DVC cache of their checkout, so that results are restored from it. The branch stays, and `dvc repro` repeats the
run from it; the folder is removed when it is old (`cf runs prune`).
"""

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
from flows.project.git import commit_paths, run_git
from flows.project.overrides import apply_overrides
from flows.project.run_lock import is_in_use

FOLDER = ".runs"
KEEP = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
EXAMPLES = """examples:
  cf runs list
  cf runs prune --keep 5     every finished run's folder but the five youngest; branches stay"""


def check_run_name(name: str) -> str:
    """Return a name that is one folder, one git branch and one word to a shell; raise ValueError for any other."""
    if not NAME.fullmatch(name) or ".." in name or name.endswith(".lock"):
        rule = "lower-case letters, digits, and . _ - between them, at most 100, without .. and not ending in .lock"
        raise ValueError(f"{name!r} can't be the name of a run; use {rule}")
    return name


def make_worktree(repo: Path, name: str, *, base: str = "HEAD", profile: str | None, overrides: Mapping[str, Any]) -> Path:
    """Create the worktree of a run on branch run/NAME from `base`, and commit its parameters; return its folder.

    A worktree that exists is used as it is, so that a run that is tried again finds its files and training goes on from its last
    checkpoint. Raises ValueError or RuntimeError for a name, profile or value that is refused; no value is changed then.
    """
    repo, name = repo.resolve(), check_run_name(name)
    branch, folder = f"run/{name}", repo / FOLDER / name
    if not (folder / ".git").is_file():  # absent, or half made: in such a folder git would act on the checkout around it
        shutil.rmtree(folder, ignore_errors=True)
        run_git(repo, "worktree", "prune")
        start = run_git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip()
        known = run_git(repo, "branch", "--list", branch).strip()
        run_git(repo, "worktree", "add", "--quiet", *([] if known else ["-b", branch]), str(folder), branch if known else start)
    else:  # a kill during the checkout leaves files out; DVC itself removes metrics before it runs their stage
        missing = [file for file in run_git(folder, "ls-files", "-z", "--deleted").split("\0") if not file.startswith("metrics/")]
        if any(missing):
            run_git(folder, "checkout", "--quiet", "--", *filter(None, missing))
    os.utime(folder)
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


def _use_profile(folder: Path, profile: str) -> None:
    """Run `cf profile use` of the worktree's own commit. Raises RuntimeError with its last line."""
    words = [sys.executable, "-m", "tasks", "profile", "use", profile]
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "`cf profile` failed").splitlines()[-1])


def list_worktrees(repo: Path) -> list[Path]:
    """Return the folders of runs, last used first."""
    folders = [path for path in (repo / FOLDER).glob("*") if (path / ".git").is_file()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def prune_worktrees(repo: Path, keep: int = KEEP, line: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Remove the folders of all runs but the `keep` last used and those in use; return the removed ones.

    What a run that died had finished is committed first, so that its branch is enough to repeat it. A folder that git can't remove
    stays and is told to `line`, because the run that tidies up must not fail for it.
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


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf runs", description=__doc__, epilog=EXAMPLES, formatter_class=form)
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
