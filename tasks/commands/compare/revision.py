"""A run by its name: a folder, a Git revision, or an experiment of DVC. The last two are put into a folder of their own."""

from __future__ import annotations

import configparser
import io
import re
import subprocess
import sys
from pathlib import Path

from tasks.params import yaml_file
from tasks.params.yaml_file import Refused

SHOWN = ("results", "samples", "data/manifest.jsonl")  # outs that a comparison reads; of the models only their curves
CURVE = "metrics.jsonl"
PLAIN = ("remote", "dir", "type", "url", "endpointurl", "region", "profile", "verify", "user", "port")  # of a DVC config


def folder(name: str, into: Path) -> Path:
    """Where the run lies; `into` is made only for a revision."""
    here = Path(name)
    if here.is_dir():
        if not (here / "params.yaml").exists():
            raise Refused(f"{name} is a folder without params.yaml; name the root of a run, a revision or an experiment")
        return here
    sha = commit(name)
    if sha is None:
        raise Refused(f"{name} is neither a folder, nor a revision of this repository, nor an experiment (`dvc exp list --all-commits`)")
    return check_out(sha, into)


def commit(name: str) -> str | None:
    """Of a branch, tag or anything Git can name; or of an experiment, which `dvc exp show` names."""
    if name.startswith("-"):
        return None
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", check=False)
    if found:
        return found
    refs = [line.split(" ", 1) for line in git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines()]
    return next((sha for sha, ref in refs if ref.split("/")[-1] == name and len(ref.split("/")) == 5), None)


def check_out(sha: str, into: Path) -> Path:
    """A clone that shares Git's objects and DVC's cache with this repository: nothing of either is copied but what is shown.

    Not `git worktree`: a comparison that is killed would leave one registered.
    """
    git("clone", "--quiet", "--shared", "--no-checkout", git("rev-parse", "--show-toplevel"), str(into))
    git("-C", str(into), "checkout", "--quiet", "--detach", sha)
    if not (into / "dvc.lock").exists():
        return into
    own = Path(".dvc/config.local")
    if own.exists():  # where its remotes are
        (into / ".dvc/config.local").write_text(without_secrets(own))
    dvc("cache", "dir", "--local", dvc("cache", "dir", cwd=Path.cwd()) or "", cwd=into)
    made = [out["path"] for stage in yaml_file.read_yaml(into / "dvc.lock")["stages"].values() for out in stage.get("outs", [])]
    wanted = [path for path in made if path in SHOWN]
    wanted += [f"{path}/{CURVE}" for path in made if path.startswith("models/")]
    wanted = [path for path in wanted if not (into / path).exists()]
    if wanted and dvc("checkout", "--quiet", *wanted, cwd=into, check=False) is None:
        for path in wanted:  # an out that is nowhere must not keep the others away, and the page says what is absent
            if dvc("checkout", "--quiet", path, cwd=into, check=False) is None:
                dvc("pull", "--quiet", path, cwd=into, check=False)
    return into


def without_secrets(config: Path) -> str:
    """Only what can hold none: a comparison that is killed leaves its folder. Secrets come from the environment."""
    own = configparser.ConfigParser(interpolation=None)
    own.read(config)
    for section in own.values():
        for key, value in list(section.items()):
            if key not in PLAIN:
                del section[key]
            elif key.endswith("url"):  # ssh needs the user, and no other address does
                section[key] = re.sub(r"(?<!ssh:)//[^/@]+@", "//", re.sub(r":[^/@:]*@", "@", value))
    own.write(text := io.StringIO())
    return text.getvalue()


def git(*words: str, check: bool = True) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode and check:
        raise Refused(f"git {words[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def dvc(*words: str, cwd: Path, check: bool = True) -> str | None:
    """None where it failed and that is no reason to stop."""
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode and check:
        raise Refused(f"dvc {words[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return None if done.returncode else done.stdout.strip()
