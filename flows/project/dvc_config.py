"""What a worktree takes over from the checkout it belongs to: its DVC cache, and its remotes without their secrets."""

import configparser
import re
from pathlib import Path

from flows.project.dvc_command import read_config, run_dvc
from tasks.files.atomic import open_partial
from tasks.files.dvc_config import read_public_config

SECRETS = ("password", "passphrase", "secret", "token", "access_key", "account_key", "credential", "connection_string")


def share_cache(repo: Path, folder: Path) -> None:
    """Write .dvc/config.local of the worktree `folder`, which git ignores, so that the worktree uses the cache and remotes of `repo`.

    It has what the config.local of `repo` states, without secrets, because those come from the environment. Paths are made absolute.
    Raises RuntimeError where `repo` is no DVC project.
    """
    try:
        config, cache = read_config(repo), run_dvc(repo, "cache", "dir").strip()
    except RuntimeError as error:
        raise RuntimeError(f"{repo} has no DVC cache to share: {error}; run `dvc init` there") from None
    shared = read_public_config(repo / ".dvc/config.local")
    for key, value in config.items():
        if (remote := re.fullmatch(r"remote\.(.+)\.url", key)) and "://" not in value:
            _set_path(shared, f"'remote \"{remote[1]}\"'", "url", value)
    _set_path(shared, "cache", "dir", str((repo / cache).resolve()))
    with open_partial(folder / ".dvc/config.local") as partial, partial.open("w") as file:
        shared.write(file)


def _set_path(config: configparser.ConfigParser, section: str, key: str, path: str) -> None:
    """Set a path in quotes, because DVC reads a bare comma as a list's and a bare # as a comment's."""
    if not config.has_section(section):
        config.add_section(section)
    config[section][key] = f"'{path}'" if '"' in path else f'"{path}"'


def is_secret(key: str) -> bool:
    """Say whether an option of a remote holds a secret itself; the path of a file that holds it is none."""
    return any(word in key for word in SECRETS) and not key.endswith(("path", "file")) and not key.startswith("ask_")
