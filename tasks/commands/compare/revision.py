"""Finding a run by its name: a folder, a Git revision or an experiment of DVC, of which the last two are checked out."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.files.dvc_config import read_public_config
from tasks.params import yaml_file
from tasks.params.yaml_file import Refused

COMPARED_OUTS = ("results", "samples", "data/manifest.jsonl")  # outs that a comparison reads; of the models it reads only the curves
CURVE_FILE = "metrics.jsonl"
GIT, DVC = ("git",), (sys.executable, "-m", "dvc")


def find_folder(name: str, into: Path) -> Path:
    """Return the folder of the run `name`; `into` is created, and returned, only for a revision or an experiment."""
    if (folder := Path(name)).is_dir():
        if not (folder / "params.yaml").exists():
            raise Refused(f"{name} is a folder without params.yaml; name the root of a run, a revision or an experiment")
        return folder
    sha = find_commit(name)
    if sha is None:
        raise Refused(f"{name} is neither a folder, nor a revision of this repository, nor an experiment (`dvc exp list --all-commits`)")
    return check_out_revision(sha, into)


def find_commit(name: str) -> str | None:
    """Return the commit of a branch, a tag or anything else Git can name, or of an experiment by its name in `dvc exp show`."""
    if name.startswith("-"):
        return None
    if sha := run_program(GIT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", check=False):
        return sha
    listed = run_program(GIT, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or ""
    refs = [line.split(" ", 1) for line in listed.splitlines()]
    return next((sha for sha, ref in refs if ref.split("/")[-1] == name and len(ref.split("/")) == 5), None)


def check_out_revision(sha: str, into: Path) -> Path:
    """Clone a revision into the folder `into`, with Git's objects and DVC's cache shared, and check out what a comparison reads.

    Not by `git worktree`, because a comparison that is killed would leave a registered worktree. The clone has this repository's
    remotes without their secrets, because that killed comparison would leave the folder too.
    """
    run_program(GIT, "clone", "--quiet", "--shared", "--no-checkout", run_program(GIT, "rev-parse", "--show-toplevel") or "", str(into))
    run_program(GIT, "checkout", "--quiet", "--detach", sha, cwd=into)
    if not (into / "dvc.lock").exists():
        return into
    with (into / ".dvc/config.local").open("w") as file:
        read_public_config(Path(".dvc/config.local")).write(file)
    run_program(DVC, "cache", "dir", "--local", run_program(DVC, "cache", "dir") or "", cwd=into)
    outs = [out["path"] for stage in yaml_file.read_yaml(into / "dvc.lock")["stages"].values() for out in stage.get("outs", [])]
    wanted = [path for path in outs if path in COMPARED_OUTS]
    wanted += [f"{path}/{CURVE_FILE}" for path in outs if path.startswith("models/")]
    wanted = [path for path in wanted if not (into / path).exists()]
    if wanted and run_program(DVC, "checkout", "--quiet", *wanted, cwd=into, check=False) is None:
        for path in wanted:  # one by one, because an absent out must not stop the others; the page says what is absent
            if run_program(DVC, "checkout", "--quiet", path, cwd=into, check=False) is None:
                run_program(DVC, "pull", "--quiet", path, cwd=into, check=False)
    return into


def run_program(program: Sequence[str], *words: str, cwd: Path | None = None, check: bool = True) -> str | None:
    """Run GIT or DVC in the folder `cwd` and return its output; after a failure raise Refused, or return None if not `check`."""
    done = subprocess.run([*program, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode and check:
        raise Refused(f"{program[-1]} {words[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return None if done.returncode else done.stdout.strip()
