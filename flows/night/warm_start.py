"""What a night begins with: the promoted student's weights as DVC data and, on warm nights, all that was made before stage 2."""

from collections.abc import Callable
from pathlib import Path

import yaml

from flows.project import dvc_graph, dvc_lock, dvc_remote, overrides
from flows.project.dvc_command import run_dvc
from flows.project.git import run_git
from flows.project.registry import WEIGHTS, Version
from tasks.params.yaml_file import read_yaml

CODEC = "models/codec"
POINTER = "promoted.dvc"
STUDENT, ITS_CODEC = "promoted/student", "promoted/codec"
START_KEY, COLD_START = "start.stage2", "models/stage1"  # what stage 2 begins from, in params.yaml; on full nights stage 1's model


def restore_promoted(repo: Path, root: Path, version: Version, log: Callable[[str], None]) -> None:
    """Put the promoted weights and their codec into promoted/, out of the cache or from the remote, and name them in promoted.dvc.

    The md5s are those of the version's own dvc.lock, so nothing is stored twice.
    """
    outs = [{**dvc_lock.find_out(repo, version.commit, path), "path": place} for path, place in ((WEIGHTS, STUDENT), (CODEC, ITS_CODEC))]
    head = f"# {version.tag}, by flows/night/warm_start.py\n"
    (root / POINTER).write_text(head + yaml.safe_dump({"outs": outs}, sort_keys=False))
    restore_targets(root, [POINTER], log)


def start_warm(repo: Path, root: Path, version: Version, keep: list[str], log: Callable[[str], None]) -> None:
    """Let stage 2 begin as the promoted student, with the stages in `keep` as they were when it was made.

    Those stages are frozen, so that DVC does not run them. All of this is in the worktree's dvc.yaml, params.yaml and dvc.lock, so
    `dvc repro` at the night's commit repeats it.
    """
    restore_promoted(repo, root, version, log)
    run_git(root, "checkout", "--quiet", version.commit, "--", "dvc.lock")
    outs = dvc_lock.read_outs(root)
    paths = [out["path"] for stage in keep for out in outs.get(stage, [])]
    # metrics are in git and not in DVC's cache
    if in_git := run_git(root, "ls-tree", "-r", "--name-only", version.commit, "--", *paths).splitlines():
        run_git(root, "checkout", "--quiet", version.commit, "--", *in_git)
    restore_targets(root, keep, log)
    dvc_graph.freeze_stages(root, keep)
    overrides.apply_overrides(root / "params.yaml", {START_KEY: STUDENT})


def start_full(root: Path) -> None:
    """Let all stages run, and stage 2 begin from stage 1, also where a warm night's branch was merged into the tracked branch."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    if frozen := [name for name, stage in stages.items() if stage.get("frozen")]:
        dvc_graph.freeze_stages(root, frozen, False)
    overrides.apply_overrides(root / "params.yaml", {START_KEY: COLD_START})


def reason_against_warm(repo: Path, root: Path, version: Version, keep: list[str]) -> str | None:
    """Return why the stages in `keep` can't be restored from the promoted version, so that the night is a full one; None if they can."""
    outs, stages = dvc_lock.read_outs_at(repo, version.commit), read_yaml(root / "dvc.yaml")["stages"]
    for stage in keep:
        if stage not in outs:
            return f"{stage} was not there when {version.name} was made"
        if stage not in stages:
            return f"dvc.yaml has no {stage}, which nightly.keep names"
    return None


def restore_targets(root: Path, targets: list[str], log: Callable[[str], None]) -> None:
    """Restore the outs of stages or .dvc files from the cache, else from the remote. Raises RuntimeError for an out that neither has."""
    try:
        run_dvc(root, "checkout", "--force", *targets)
    except RuntimeError:
        log(f"the cache lacks some of {', '.join(targets)}; asking the remote")
        dvc_remote.pull_outs(root, targets=targets, log=log)
    recorded = [(name, out["path"]) for name, outs in dvc_lock.read_outs(root).items() for out in outs if name in targets]
    for name, path in recorded:
        if not (root / path).exists():
            raise RuntimeError(f"{name}: {path} is neither in the DVC cache nor at the remote, so the night can't begin with it")
