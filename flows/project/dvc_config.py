"""What a worktree takes from the checkout it belongs to: its DVC cache, and its remotes without their secrets."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

from tasks.files.atomic import open_partial
from tasks.files.dvc_config import read_public_config

SECRETS = ("password", "passphrase", "secret", "token", "access_key", "account_key", "credential", "connection_string")


def share_cache(repo: Path, folder: Path) -> None:
    """.dvc/config.local, which git ignores: the cache of `repo` by its absolute path, and what `repo` states in its own, without
    secrets. Those come from the environment. Remotes that are folders are where they are for `repo`."""
    stated = dict(line.split("=", 1) for line in _dvc(repo, "config", "--list").splitlines() if "=" in line)
    own = read_public_config(repo / ".dvc/config.local")
    for key, value in stated.items():
        if (found := re.fullmatch(r"remote\.(.+)\.url", key)) and "://" not in value:
            _set_path(own, f"'remote \"{found[1]}\"'", "url", value)
    _set_path(own, "cache", "dir", str((repo / _dvc(repo, "cache", "dir").strip()).resolve()))
    with open_partial(folder / ".dvc/config.local") as partial, partial.open("w") as file:
        own.write(file)


def _set_path(config: configparser.ConfigParser, section: str, key: str, path: str) -> None:
    """DVC would read a comma as a list's and a # as a comment's."""
    if not config.has_section(section):
        config.add_section(section)
    config[section][key] = f"'{path}'" if '"' in path else f'"{path}"'


def is_secret(key: str) -> bool:
    """Whether an option of a remote holds one, and not just the way to it."""
    return any(word in key for word in SECRETS) and not key.endswith(("path", "file")) and not key.startswith("ask_")


def _dvc(repo: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=repo, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{repo} has no DVC cache to share: {done.stderr.strip() or 'dvc failed'}; run `dvc init` there")
    return done.stdout
