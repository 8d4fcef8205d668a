"""A stage's run as W&B sees it: offline unless the environment says otherwise. The only file that knows W&B.

Group = one run of the pipeline, job type = stage. Outs are artifacts that refer to the files DVC holds, and a stage's inputs
are the outs of the stages before it: their digests are made of DVC's md5s, so that the versions are the same ones and W&B
draws clips → latents → teacher → students → report. Whatever goes wrong here is a warning and never ends a stage.
"""

from __future__ import annotations

import base64
import os
import socket
import time
import urllib.parse
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.files.hashes import digest, files

from . import journal, lineage
from . import media as shown

if TYPE_CHECKING:
    from tasks.params.schema import Tracking

PATIENCE = 120  # seconds that a stage waits at its end for W&B to take what is left; W&B alone would wait for ever
MEDIA = "media"  # in a row of the journal: key -> md5 and caption of a file that W&B has copied


class Mirror:
    """One run: in our journal at once, and in W&B as far as that works."""

    def __init__(self, book: journal.Journal) -> None:
        self.book, self.about = book, book.about
        self.run: Any = None
        self.folder: str | None = None
        self.url: str | None = None  # once it is online
        self.broken = False

    def start(self) -> None:
        self._try(self.init)
        self._aside("inputs", self._inputs)

    def log(self, row: Mapping[str, Any]) -> None:
        row = {**row, "_timestamp": round(time.time(), 3)}
        self._noted(lambda: self.book.row(row))
        self._try(lambda: self.run.log(row))

    def show(self, step: int | None, shown_files: Mapping[str, Path], captions: Mapping[str, str] | None = None) -> None:
        """Videos (.mp4) and pictures by key. W&B copies them into its folder, so they may go afterwards."""
        clips = {key: [shown.Clip(file, (captions or {}).get(key, ""))] for key, file in shown_files.items()}
        row: dict[str, Any] = {"_timestamp": round(time.time(), 3)} | ({} if step is None else {"step": step})
        self._noted(lambda: self.book.row(row | {MEDIA: {key: [digest(clip.file), clip.caption] for key, (clip,) in clips.items()}}))
        self._aside("media", self.media, clips, row)

    def finish(self, metrics: Mapping[str, Any], exit_code: int) -> None:
        if exit_code == 0:
            self._aside("outs", self.outs, metrics)
        self._try(lambda: self.run.summary.update(dict(metrics)))
        self._try(lambda: self._end(exit_code))
        self._noted(lambda: self.book.note(exit_code=exit_code, summary=dict(metrics), broken=self.broken))
        if self.broken and exit_code == 0:  # what `cf wandb sync` may still tell of, if it is the same then
            self._noted(lambda: self.book.note(outs={str(held.path): held.md5 for held in self._held(lineage.made)}))
        self._noted(self.book.close)

    def init(self) -> None:
        mode, why = self.about["mode"], unreachable() if self.about["mode"] == "online" else None
        try:
            self.run = None if why else init(self.about, mode)
        except Exception as error:
            if mode != "online":
                raise
            why = said(error)
        if why:  # a night without the network is sent the next day: `cf wandb sync`
            warnings.warn(f"W&B: {why}; this run is written offline, `cf wandb sync` sends it", stacklevel=2)
            # W&B holds the first id for the run that could not start
            self.book.note(mode="offline", id=f"{self.about['id']}-offline")
            self.about = self.book.about
            self.run = init(self.about, "offline")
        self.folder = os.path.relpath(Path(self.run.dir).parent)
        self.url = self.run.url if self.about["mode"] == "online" else None
        self.book.note(folder=str(Path(self.run.dir).parent.absolute()))

    def _end(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code=exit_code)
            self.book.note(sent=self.about["mode"] == "online")
        except TimeoutError:  # all of it is in W&B's file
            warnings.warn(f"W&B did not take all of the run within {PATIENCE} s; `cf wandb sync` sends it", stacklevel=2)

    def _held(self, which: Callable[..., list[lineage.Held]]) -> list[lineage.Held]:
        return which(self.about["job_type"], self.about["config"])

    def _inputs(self) -> None:
        for held in self._held(lineage.used):
            self._aside(f"input {held.path}", self.use, held)

    def use(self, held: lineage.Held) -> None:
        # run.use_artifact refuses when offline; this is the call it makes when online with an artifact that is not yet there:
        # the server finds it by its digest, or makes it, and then notes that this run used it
        use = {"aliases": [lineage.alias(self.about["group"])], "is_user_created": True, "use_after_commit": True}
        self.run._log_artifact(artifact(held, self.about, by_this_run=False), **use)

    def outs(self, metrics: Mapping[str, Any]) -> None:
        evaluate = self.about["config"].get("evaluate") or {}
        for held in self._held(lineage.made):
            self._aside("sample videos", lambda path: self.media(shown.videos(path), {}), held.path)
            self._aside("table", self._table, held.path, metrics, evaluate)
            self._aside(f"out {held.path}", self._made, held)

    def _made(self, held: lineage.Held) -> None:
        self.run.log_artifact(artifact(held, self.about), aliases=["latest", lineage.alias(self.about["group"])])

    def media(self, clips: Mapping[str, list[shown.Clip]], row: dict[str, Any]) -> None:
        import wandb

        def one(clip: shown.Clip) -> Any:
            if clip.file.suffix != ".mp4":
                return wandb.Image(str(clip.file), caption=clip.caption)
            return wandb.Video(str(clip.file), caption=clip.caption, format="mp4")

        if clips:
            self.run.log(row | {key: [one(clip) for clip in some] for key, some in clips.items()})

    def _table(self, out: Path, metrics: Mapping[str, Any], evaluate: Mapping[str, Any]) -> None:
        rows = shown.table(out, metrics, resamples=evaluate.get("resamples", 1000), seed=self.about["config"].get("seed", 0))
        if rows:
            import wandb

            self.run.log({"evaluation": wandb.Table(columns=list(shown.COLUMNS), data=[list(row) for row in rows])})

    # --------------------------------------------------------------------------------------- never worth a stage

    def _try(self, action: Callable[[], Any]) -> None:
        """What a run can't go on without: after the first failure W&B is left alone, and the journal goes on."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # Choice: a tracker is never worth a training run, whatever it raises
            self.broken = True
            stage = self.about["job_type"]
            warnings.warn(f"W&B stopped working ({said(error)}); {stage} goes on, its values are in {self.book.folder}", stacklevel=3)

    def _noted(self, action: Callable[[], Any]) -> None:
        """In the journal: a disk that is full is the stage's own affair."""
        try:
            action()
        except Exception as error:
            warnings.warn(f"{self.about['job_type']}: {self.book.folder} could not be written ({said(error)})", stacklevel=3)

    def _aside(self, what: str, action: Callable[..., Any], *given: Any) -> None:
        """What the run's numbers do not need."""
        if self.broken:
            return
        try:
            action(*given)
        except Exception as error:
            warnings.warn(f"{self.about['job_type']}: W&B did not get the {what} ({said(error)})", stacklevel=3)


def init(about: Mapping[str, Any], mode: str, folder: Path | None = None) -> Any:
    """W&B's run of a journal's `about`."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash reports: nobody asked for them
    (folder := folder or home()).mkdir(parents=True, exist_ok=True)
    # tables wait there until they are sent: beside the run, where `cf wandb sync` of this checkout finds them
    os.environ.setdefault("WANDB_DATA_DIR", str(home().absolute() / "wandb-data"))
    Path(os.environ["WANDB_DATA_DIR"]).mkdir(parents=True, exist_ok=True)
    import wandb

    settings = wandb.Settings(
        disable_git=True, disable_code=True, x_disable_stats=True, console="off", silent=True,
        init_timeout=30, finish_timeout=PATIENCE, finish_timeout_raises=True,
    )  # fmt: skip
    keys = ("project", "group", "job_type", "name", "id", "config", "tags")
    run = wandb.init(**{key: about[key] for key in keys}, mode=mode, dir=str(folder), settings=settings)  # type: ignore[arg-type]
    run.define_metric("*", step_metric="step")
    return run


def artifact(held: lineage.Held, about: Mapping[str, Any], *, by_this_run: bool = True) -> Any:
    """Files are named, not copied. Each entry gets its content's md5, which was taken anyway, instead of one more reading."""
    import wandb

    config = about["config"]
    told: dict[str, Any] = {"dvc_path": str(held.path), "dvc_md5": held.md5} | held.size()
    if by_this_run:
        told |= {"git_sha": config["git"]["sha"], "git_dirty": config["git"]["dirty"], "stage": about["job_type"], "run": about["group"]}
    made = wandb.Artifact(held.name, type=held.kind, metadata=told)
    entries = made.add_reference(held.path.absolute().as_uri(), name=str(held.path), checksum=False, max_objects=None)
    md5s = {file.absolute().as_uri(): digest(file) for file in files(held.path)}
    for entry in entries:
        entry.digest = base64.b64encode(bytes.fromhex(md5s[Path(entry.ref.removeprefix("file://")).as_uri()])).decode()
    return made


def unreachable() -> str | None:
    """Why the server can't be reached, in seconds: W&B tries for a minute, in each stage. Behind a proxy only W&B can tell."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    import wandb

    url = urllib.parse.urlsplit(wandb.setup().settings.base_url)  # `wandb login --host` has said where it is, or WANDB_BASE_URL
    try:
        socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        return f"{url.hostname} can't be reached ({error})"
    return None


def home() -> Path:
    return Path(os.environ.get("WANDB_DIR") or "runtime")  # W&B adds wandb/ itself


def begin(stage: str, tracking: Tracking, stated: Mapping[str, Any], work: Path) -> Mirror | None:
    """params.tracking says whether, and the environment has the last word: `WANDB_MODE=online dvc repro`."""
    mode = os.environ.get("WANDB_MODE") or {"off": "disabled"}.get(tracking.wandb, tracking.wandb)
    if mode == "disabled":
        return None
    try:
        mirror = Mirror(book(stage, mode, tracking.project, stated, work))
    except Exception as error:
        warnings.warn(f"nothing of {stage} is tracked in W&B ({said(error)}); its values are in metrics.jsonl", stacklevel=2)
        return None
    mirror.start()
    return mirror


def book(stage: str, mode: str, project: str, stated: Mapping[str, Any], work: Path) -> journal.Journal:
    """A journal whose first page is all that W&B is told of a run at its start."""
    root, group = home() / "journal", lineage.pipeline_run(Path("work"))
    before = journal.earlier(root, work.absolute())
    attempt = before["attempt"] + 1 if before else 1
    folder = journal.claim(root, group, stage, attempt)
    origins = {"git": lineage.git(), "dvc": lineage.dvc(stage, stated)}
    numbered = {"attempt": attempt, "resume_of": before["id"] if before else None}
    about = {
        "id": folder.name, "group": group, "job_type": stage, "project": project, "mode": mode,
        "name": f"{stage} {group}" + (f", attempt {attempt}" if before else ""),
        "tags": [f"profile {stated['profile']}"] if "profile" in stated else [],
        "work": str(work.absolute()), "cwd": str(Path.cwd()), "started": time.time(),
        "config": {**stated, **origins, "run": group, **numbered},
    }  # fmt: skip
    return journal.Journal(folder, about | numbered)


def said(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "WANDB_API_KEY") if key else text
