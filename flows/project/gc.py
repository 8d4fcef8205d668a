"""`cf gc`: removal of what of the DVC cache nothing names any more.

`dvc gc` itself keeps too little: it knows no other worktrees, and it removes metrics that git tracks, without which DVC's run cache
can't restore a stage, so that a run with parameters that were tried before would train again.
"""

import re
from contextlib import ExitStack
from pathlib import Path

from flows.cli import one_line_errors
from flows.project.dvc_command import run_dvc
from flows.project.git import run_git
from flows.project.run_lock import hold_checkout
from tasks.files.dvc_rwlock import find_dvc
from tasks.files.options import parse_options
from tasks.files.words import count_things

MD5 = re.compile(r"\b[0-9a-f]{32}(?:\.dir)?\b")
RECORDS = ("*dvc.lock", "*.dvc")  # git's patterns of the files in which DVC names objects, at any depth
KEPT = ("refs/heads", "refs/tags", "refs/exps", "refs/stash")


def list_checkouts(repo: Path) -> list[Path]:
    """Return the checkout and all its worktrees that are there, wherever they lie."""
    rows = run_git(repo, "worktree", "list", "--porcelain").splitlines()
    folders = [Path(row.removeprefix("worktree ")) for row in rows if row.startswith("worktree ")]
    return [folder for folder in folders if (folder / ".dvc").is_dir()]


def find_named(repo: Path, cache: Path) -> set[str]:
    """Return the md5 of every object that a branch, tag, experiment or worktree names in a dvc.lock or *.dvc, with what is in folders."""
    named: set[str] = set()
    for commit in set(run_git(repo, "for-each-ref", "--format=%(objectname)", *KEPT).split()):
        files = run_git(repo, "ls-tree", "-r", "--name-only", "-z", commit).split("\0")
        for file in (file for file in files if file.endswith(("dvc.lock", ".dvc"))):
            named.update(MD5.findall(run_git(repo, "show", f"{commit}:{file}")))
    for folder in list_checkouts(repo):
        for file in run_git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *RECORDS).split("\0"):
            if file and (folder / file).is_file():
                named.update(MD5.findall((folder / file).read_text()))
    listings = [cache / md5[:2] / md5[2:] for md5 in named if md5.endswith(".dir")]
    return named.union(*(MD5.findall(listing.read_text()) for listing in listings if listing.is_file()))


def find_cache(repo: Path) -> Path:
    """Return the folder of the cache's objects. Raises ValueError where other checkouts may use it, or where `repo` is a worktree."""
    if not (repo / ".git").is_dir():
        raise ValueError(f"{repo} is no checkout of its own; run `cf gc` where its .git lies")
    cache = (repo / run_dvc(repo, "cache", "dir").strip()).resolve()
    if not cache.is_relative_to(repo):
        raise ValueError(f"the cache is {cache}, which other checkouts may use; `dvc gc --projects` knows those that you name")
    return cache / "files/md5"


@one_line_errors
def main(argv: list[str]) -> None:
    options, repo = parse_options("gc", argv), Path.cwd().resolve()
    cache, checkouts = find_cache(repo), list_checkouts(repo)
    with ExitStack() as held:
        if options.delete:
            if busy := [pid for folder in checkouts for pid in find_dvc(folder)]:
                raise ValueError(f"dvc is at work here (process {', '.join(map(str, busy))}); wait for its end")
            for folder in checkouts:
                held.enter_context(hold_checkout(folder))
        named, files = find_named(repo, cache), cache.glob("[0-9a-f][0-9a-f]/*")
        unnamed = [file for file in files if MD5.fullmatch(md5 := file.parent.name + file.name) and md5 not in named]
        size = sum(file.stat().st_size for file in unnamed) / 2**30
        for file in unnamed if options.delete else ():
            file.unlink(missing_ok=True)
    way = "nothing to remove" if not unnamed else "removed" if options.delete else "which `cf gc --delete` removes"
    print(f"{count_things(len(unnamed), 'object')} of the cache ({size:.2f} GiB) that no branch, tag, experiment or worktree names: {way}")
