"""A stage's run in W&B: offline unless the environment says otherwise. The only file that imports wandb.

Group = one run of the pipeline, job type = stage. Outs are artifacts that refer to the files DVC tracks, and a stage's inputs are the
outs of the stages before it: their digests are made of DVC's md5s, so that the versions are the same and W&B draws clips → latents →
teacher → students → report. Whatever goes wrong here is a warning and never ends a stage.

Videos and the table of results have the same keys in every run, because W&B puts runs with equal keys side by side. The videos are
those of the first prompts of the index, first seed, in every run the same: the report's worst cases differ from run to run.

An attempt that continues a killed one logs the earlier steps again, so the last attempt's run has all of them.
"""

import base64
import json
import os
import re
import secrets
import socket
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cf_model.evaluate import excerpt
from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5, list_files
from tasks.files.json_lines import read_json_lines
from tasks.files.locks import try_lock
from tasks.params.project import Project

from . import lineage

FINISH_SECONDS = 120  # that a stage waits at its end for W&B to take what is left; W&B alone would wait for ever
ATTEMPT_FILE = "wandb.json"  # in the stage's working folder, which a success removes: the id and number of the last attempt
MARK = "unsent-"  # beginning of the name of a file beside the folder of a run that W&B's server may lack; its id follows
ARTIFACT_TYPES = {"data": "dataset", "models": "model", "samples": "videos", "results": "evaluation", "reports": "report"}


class WandbRun:
    """One attempt of a stage in W&B. `folder` and `url` (online only) say where it is."""

    def __init__(self, stage: str, project: Project, mode: str, about: dict[str, Any]) -> None:
        """`about`: what wandb.init takes to name and describe the run."""
        self.stage, self.project, self.mode, self.about = stage, project, mode, about
        self.alias = re.sub("[/:]", "-", about["group"])  # of artifacts; W&B forbids / and : there
        self.run: Any = None
        self.folder: str | None = None
        self.url: str | None = None
        self.broken = False
        self._mark: IO[str] | None = None

    def start(self) -> None:
        self._attempt(None, self._open)
        self._attempt("inputs", self._use_inputs)

    def log(self, row: Mapping[str, Any]) -> None:
        self._attempt(None, lambda: self.run.log(dict(row)))

    def show(self, step: int, files: Mapping[str, Path], captions: Mapping[str, str]) -> None:
        """Show videos by key. W&B copies them into its folder, so they may be deleted afterwards."""
        self._attempt("media", self._log_videos, {key: [(file, captions[key])] for key, file in files.items()}, {"step": step})

    def replay(self, *tables: Sequence[Mapping[str, Any]]) -> None:
        """Log the rows of earlier attempts, and show their files, in the order of the steps.

        The reason is that the run of a killed attempt lacks its last seconds.
        """
        for row in sorted((row for table in tables for row in table), key=lambda row: int(row["step"])):
            if "files" in row:
                self.show(row["step"], {key: Path(file) for key, file in row["files"].items()}, row["captions"])
            else:
                self.log(row)

    def finish(self, metrics: Mapping[str, Any], exit_code: int) -> None:
        if exit_code == 0:
            self._attempt("outs", self._log_outs, metrics)
        self._attempt(None, lambda: self.run.summary.update(dict(metrics)))
        self._attempt(None, self._close, exit_code)

    def _open(self) -> None:
        problem = explain_unreachable() if self.mode == "online" else None
        try:
            self.run = None if problem else self._open_marked(self.mode)
        except Exception as error:
            if self.mode != "online":
                raise
            problem = describe_error(error)
        if problem:  # a night without network is sent the next day
            warnings.warn(f"W&B: {problem}; this run is written offline, `cf wandb sync` sends it", stacklevel=2)
            self.mode = "offline"
            self.about["id"] += "-offline"  # W&B reserves the first id for the run that could not start
            self.run = self._open_marked("offline")
        self.folder = os.path.relpath(Path(self.run.dir).parent)
        self.url = self.run.url if self.mode == "online" else None

    def _open_marked(self, mode: str) -> Any:
        """Make W&B's run while its mark is held: a run without a mark would be sent by `cf wandb sync`, without what comes later."""
        self._mark = hold_mark(self.about["id"])
        try:
            return open_run(self.about, mode)
        except Exception:
            self._remove_mark()
            raise

    def _close(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:  # W&B's file has the whole run, and its mark stays
            warnings.warn(f"W&B did not take all of the run within {FINISH_SECONDS} s; `cf wandb sync` sends it", stacklevel=2)
            return
        self._remove_mark()

    def _remove_mark(self) -> None:
        if self._mark:
            Path(self._mark.name).unlink(missing_ok=True)
            self._mark.close()

    def _use_inputs(self) -> None:
        # run.use_artifact refuses when offline. This is the call that it makes online for an artifact that the server may lack:
        # the server finds the artifact by its digest, or creates it, and then records that this run used it.
        use, about = {"aliases": [self.alias], "is_user_created": True, "use_after_commit": True}, self.about
        for path in lineage.list_inputs(self.stage, self.project):
            name = f"input {path}"
            self._attempt(name, lambda path: self.run._log_artifact(build_artifact(path, about, by_this_run=False), **use), path)

    def _log_outs(self, metrics: Mapping[str, Any]) -> None:
        aliases = ["latest", self.alias]
        for out in filter(Path.exists, lineage.list_outs(self.project.stage(self.stage))):
            index = read_json_lines(out / "index.jsonl", missing_ok=True)
            self._attempt("sample videos", lambda out, index: self._log_videos(excerpt.select_videos(index, out), {}), out, index)
            self._attempt("table", self._log_table, out, metrics)
            self._attempt(f"out {out}", lambda out: self.run.log_artifact(build_artifact(out, self.about), aliases=aliases), out)

    def _log_videos(self, videos: Mapping[str, Iterable[tuple[Path, str]]], row: dict[str, Any]) -> None:
        """Log (file, caption) pairs by key, with the numbers of a row."""
        import wandb

        if videos:
            movies = {key: [wandb.Video(str(file), caption=words, format="mp4") for file, words in some] for key, some in videos.items()}
            self.run.log(row | movies)

    def _log_table(self, out: Path, metrics: Mapping[str, Any]) -> None:
        config, cells = self.about["config"], read_json_lines(out / "cells.jsonl", missing_ok=True)
        resamples = (config.get("evaluate") or {}).get("resamples", 1000)
        if cells:
            import wandb

            rows = excerpt.build_table(cells, metrics, resamples=resamples, seed=config.get("seed", 0))
            self.run.log({"evaluation": wandb.Table(columns=list(excerpt.TABLE_COLUMNS), data=[list(row) for row in rows])})

    def _attempt(self, name: str | None, action: Callable[..., Any], *args: Any) -> None:
        """Do something in W&B; a failure is a warning that names the thing. Without a name it is what the run can't continue without:
        after its first failure W&B is not used any more.
        """
        if self.broken:
            return
        try:
            action(*args)
        except Exception as error:  # Choice: a tracker is never worth a training run, whatever it raises
            self.broken = name is None
            lost = f"{self.stage}: W&B did not get the {name} ({describe_error(error)})"
            stopped = f"W&B stopped working ({describe_error(error)}); {self.stage} goes on, its values are in metrics.jsonl"
            warnings.warn(lost if name else stopped, stacklevel=3)


def start_run(stage: str, project: Project, work: Path) -> WandbRun | None:
    """Start a stage's run, or return None where W&B is disabled or cannot start.

    params.tracking says in which mode, and the environment has the last word: `WANDB_MODE=online dvc repro`.
    """
    tracking = project.params.tracking
    mode = os.environ.get("WANDB_MODE") or {"off": "disabled"}.get(tracking.wandb, tracking.wandb)
    if mode == "disabled":
        return None
    try:
        run = WandbRun(stage, project, mode, describe_run(stage, project, work))
    except Exception as error:
        warnings.warn(f"nothing of {stage} is tracked in W&B ({describe_error(error)}); its values are in metrics.jsonl", stacklevel=2)
        return None
    run.start()
    return run


def describe_run(stage: str, project: Project, work: Path) -> dict[str, Any]:
    """Return the arguments of wandb.init: a unique readable id, names, and a config of parameters, commit and DVC's md5s.

    `resume_of` is the id of the attempt before, if that one left its working folder; the new attempt is recorded there in turn.
    """
    file, group, tree = work / ATTEMPT_FILE, lineage.name_pipeline_run(Path("work")), project.tree
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"attempt": 0, "id": None}
    attempt = before["attempt"] + 1
    words = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{group[-40:]}-{stage}-{attempt}").strip("-")
    run_id = f"{words}-{secrets.token_hex(2)}"
    # the md5s that dvc.lock will have; code is left out, because the commit and its list of changed files name it
    deps = [Path(dep) for dep in project.stage(stage).get("deps", []) if not dep.endswith((".py", ".j2"))]
    origins = {"git": lineage.describe_git(), "dvc": {"stage": stage, "deps": {str(dep): compute_dvc_md5(dep) for dep in deps}}}
    write_atomically(file, json.dumps({"attempt": attempt, "id": run_id}) + "\n")
    return {
        "id": run_id, "group": group, "job_type": stage, "project": project.params.tracking.project,
        "name": f"{stage} {group}" + (f", attempt {attempt}" if attempt > 1 else ""),
        "tags": [f"profile {tree['profile']}"] if "profile" in tree else [],
        "config": {**tree, **origins, "run": group, "attempt": attempt, "resume_of": before["id"]},
    }  # fmt: skip


def open_run(about: Mapping[str, Any], mode: str) -> Any:
    """Return W&B's run, without its telemetry, machine statistics, console, code and launch inputs."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash reports
    folder = find_home()
    folder.mkdir(parents=True, exist_ok=True)
    # tables wait in WANDB_DATA_DIR until they are sent: beside the run, where `cf wandb sync` of this checkout finds them
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.absolute() / "wandb-data"))
    Path(os.environ["WANDB_DATA_DIR"]).mkdir(parents=True, exist_ok=True)
    import wandb

    # Inputs of W&B Launch, which nothing here uses: looking for them imports W&B's public API, a second of CPU time and more.
    wandb.Run._detect_and_apply_job_inputs = lambda run: None
    settings = wandb.Settings(
        disable_git=True, disable_code=True, x_disable_stats=True, console="off", silent=True,
        init_timeout=30, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
    )  # fmt: skip
    run = wandb.init(**about, mode=mode, dir=str(folder), settings=settings)  # type: ignore[arg-type]
    run.define_metric("*", step_metric="step")
    return run


def find_home() -> Path:
    """Return the folder below which W&B writes wandb/."""
    return Path(os.environ.get("WANDB_DIR") or "runtime")


def hold_mark(run_id: str) -> IO[str] | None:
    """Make and lock a run's mark. The kernel frees the lock when the process ends, also by kill -9."""
    folder = find_home() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    (mark := folder / f"{MARK}{run_id}").touch()
    return try_lock(mark)


def build_artifact(path: Path, about: Mapping[str, Any], *, by_this_run: bool = True) -> Any:
    """Return an artifact that names what DVC tracks at `path` without copying it; each entry's digest is DVC's md5 of the file.

    The artifact's name in W&B is the same wherever and whenever it is made.
    """
    import wandb

    git, files = about["config"]["git"], list(list_files(path))
    size = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    metadata: dict[str, Any] = {"dvc_path": str(path), "dvc_md5": compute_dvc_md5(path)} | size
    if by_this_run:
        metadata |= {"git_sha": git["sha"], "git_dirty": git["dirty"], "stage": about["job_type"], "run": about["group"]}
    artifact = wandb.Artifact(path.stem, type=ARTIFACT_TYPES.get(path.parts[0], "output"), metadata=metadata)
    entries = artifact.add_reference(path.absolute().as_uri(), name=str(path), checksum=False, max_objects=None)
    md5s = {file.absolute().as_uri(): compute_dvc_md5(file) for file in files}
    for entry in entries:
        entry.digest = base64.b64encode(bytes.fromhex(md5s[Path(entry.ref.removeprefix("file://")).as_uri()])).decode()
    return artifact


def explain_unreachable() -> str | None:
    """Say within seconds why W&B's server can't be reached, because W&B itself tries for a minute in each stage.

    None if it can be, or behind a proxy, where only W&B can tell. `wandb login --host` or WANDB_BASE_URL has said where it is.
    """
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    import wandb

    url = urllib.parse.urlsplit(wandb.setup().settings.base_url)
    try:
        socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        return f"{url.hostname} can't be reached ({error})"
    return None


def describe_error(error: Exception) -> str:
    """Return an error as one line without W&B's key."""
    return hide_key(" ".join(str(error).split())[:300] or type(error).__name__)


def hide_key(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "WANDB_API_KEY") if key else text
