"""The one place that starts git: answers as text, refusals as RuntimeError, and never a question to a person."""

import os
import subprocess
from pathlib import Path

# Commits of runs are signed by no person, and hooks are for people: `dvc install` adds one that checks everything out.
PLAIN = ["git", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
IDENTITY = {"user.name": "context-forcing", "user.email": "context-forcing@localhost"}


def run_git(folder: Path, *words: str, **variables: str) -> str:
    """Run git with `variables` added to the environment; return its output. Raises RuntimeError with git's complaint as one sentence."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **variables}
    done = subprocess.run([*PLAIN, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`git {' '.join(words[:3])}` failed in {folder}: {' '.join(done.stderr.split()) or 'without a word'}")
    return done.stdout


def commit_paths(folder: Path, paths: list[str], message: str) -> str:
    """Commit those of `paths` that differ from the last commit; return the last commit, which is the new one if any did."""
    run_git(folder, "add", "--", *[path for path in paths if (folder / path).exists()])
    if run_git(folder, "diff", "--cached", "--name-only").strip():
        run_git(folder, *identity_options(folder), "commit", "--quiet", "--no-verify", "--message", message)
    return run_git(folder, "rev-parse", "HEAD").strip()


def read_committed(repo: Path, commit: str, path: str) -> str | None:
    """Return a file's text at a commit, branch or tag; None if that lacks the file, or if there is no such commit."""
    try:
        return run_git(repo, "show", "--end-of-options", f"{commit}:{path}")
    except RuntimeError:
        return None


def resolve_commit(repo: Path, commit: str) -> str:
    """Return the full id of a commit, branch or tag. Raises ValueError for what names no commit."""
    try:
        return run_git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}").strip()
    except RuntimeError:
        raise ValueError(f"{commit!r} is no commit of {repo}") from None


def identity_options(repo: Path) -> list[str]:
    """Return the options that name an author, for a machine where git knows no name or address; empty where it does."""
    try:
        configured = run_git(repo, "config", "--get-regexp", r"^user\.(name|email)$").lower()
    except RuntimeError:
        configured = ""  # git's exit code 1: neither is set
    return [word for key, value in IDENTITY.items() if f"{key} " not in configured for word in ("-c", f"{key}={value}")]
