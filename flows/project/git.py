"""TODO: what flows.project.git is for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# a run's branch is nobody's to sign, and the project's hooks are for people: `dvc install` puts one there that checks everything out
PLAIN = ["git", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]


def commit_paths(folder: Path, paths: list[str], message: str) -> str:
    """Only these, if they differ from what is committed; the commit that then is the run's."""
    run_git(folder, "add", "--", *[path for path in paths if (folder / path).exists()])
    if run_git(folder, "diff", "--cached", "--name-only").strip():
        who = {"user.name": "context-forcing", "user.email": "context-forcing@localhost"}
        stated = [word for key, value in who.items() if not _is_configured(folder, key) for word in ("-c", f"{key}={value}")]
        run_git(folder, *stated, "commit", "--quiet", "--no-verify", "--message", message)
    return run_git(folder, "rev-parse", "HEAD").strip()


def read_committed(folder: Path, path: str) -> str:
    """A file's text at the last commit; empty where it isn't in it."""
    try:
        return run_git(folder, "show", f"HEAD:{path}")
    except RuntimeError:
        return ""


def run_git(folder: Path, *words: str) -> str:
    """Git's answer, or its complaint in one sentence. Never asks for a password."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run([*PLAIN, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`git {' '.join(words[:3])}` failed in {folder}: {' '.join(done.stderr.split()) or 'without a word'}")
    return done.stdout


def _is_configured(folder: Path, key: str) -> bool:
    return subprocess.run(["git", "config", key], cwd=folder, capture_output=True).returncode == 0


def identity_options(repo: Path) -> list[str]:
    """Options for git where nobody has said who they are."""
    who = {"user.name": "context-forcing", "user.email": "context-forcing@localhost"}
    asked = {key: subprocess.run(["git", "config", key], cwd=repo, capture_output=True).returncode for key in who}
    return [word for key, value in who.items() if asked[key] for word in ("-c", f"{key}={value}")]


def resolve_commit(repo: Path, commit: str) -> str:
    try:
        return run_git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}").strip()
    except RuntimeError:
        raise ValueError(f"{commit!r} is no commit of {repo}") from None
