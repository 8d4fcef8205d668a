"""A run that was killed, or that W&B stopped following, written anew and whole from its journal (tasks/wandb_log/journal.py).

Nothing is added to W&B's own file, in which rows would then stand twice: a new folder takes its place, and what there was is
renamed to killed-..., which `wandb sync` does not look at. A rebuild that is killed itself can be started again: folders are
found by the run's id, whatever they are called by then. tasks/wandb_log/sync.py calls this, one run a process.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.files.hashes import digest, dvc_md5

from . import journal, lineage, run
from . import media as shown

KILLED = 137  # exit code of a run that was killed: the shell's word for kill -9
COMPLETED = "completed from metrics.jsonl"


def rebuild(folder: Path) -> Path:
    """The new folder of the run in journal `folder`. Raises BlockingIOError while the run still lives."""
    about = json.loads((folder / journal.ABOUT).read_text())
    book, code = journal.Journal(folder, about), about.get("exit_code", KILLED)
    told = about | {"tags": list(dict.fromkeys([*about["tags"], COMPLETED]))}
    if about["mode"] == "online":  # the server has part of it: a second run beside it, rather than rows that stand twice
        told |= {"id": f"{about['id']}-whole", "name": f"{about['name']}, whole"}
    (place := folder.parents[1] / "wandb").mkdir(exist_ok=True)
    before = [old for name in dict.fromkeys([about["id"], told["id"]]) for old in sorted(place.glob(f"*run-????????_??????-{name}"))]
    shutil.rmtree(folder / "wandb", ignore_errors=True)  # half made by a rebuild that was killed
    again = run.Mirror(book)
    again.run = run.init(told, "offline", folder)
    write(again, about, before)
    again.run.finish(exit_code=code)
    new = Path(again.run.dir).parent
    for old in before:
        if not old.name.startswith("killed-"):
            old.rename(old.with_name(f"killed-{old.name}"))
    whole = new.rename(place / new.name)
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    latest = place / "latest-run"  # what `wandb leet` opens when it is given no run
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
        latest.symlink_to(whole.name)
    book.note(id=told["id"], folder=str(whole.absolute()), mode="offline", exit_code=code, broken=False, rebuilt=True)
    book.close()
    return whole


def write(again: run.Mirror, about: Mapping[str, Any], before: Sequence[Path]) -> None:
    """Inputs and outs only if they are still what they were, media if W&B's old folders still have them; the rows in any case:
    dvc.yaml may be another one by now, and may not fit these parameters."""
    again._aside("inputs", inputs, again, about)
    kept = {digest(file): file for old in before for file in old.glob("files/media/**/*") if file.is_file()}
    for row in journal.rows(again.book.folder):
        media = row.pop(run.MEDIA, {})
        clips = {key: [shown.Clip(kept[md5], caption)] for key, (md5, caption) in media.items() if md5 in kept}
        if clips:
            again._aside("media", again.media, clips, row)
        elif not media:
            again.run.log(row)  # with its own _timestamp; W&B counts _runtime from now, whatever is given
    again._aside("outs", outs, again, about)
    again.run.summary.update(about.get("summary", {}))


def inputs(again: run.Mirror, about: Mapping[str, Any]) -> None:
    deps = {Path(path): md5 for path, md5 in about["config"]["dvc"]["deps"].items()}
    same = [path for path, md5 in deps.items() if path.exists() and dvc_md5(path) == md5]
    for held in lineage.used(about["job_type"], about["config"]):
        if any(path.is_relative_to(held.path) for path in same):
            again.use(held)


def outs(again: run.Mirror, about: Mapping[str, Any]) -> None:
    made = about.get("outs")
    if made and made == {str(held.path): held.md5 for held in lineage.made(about["job_type"], about["config"])}:
        again.outs(about["summary"])


if __name__ == "__main__":
    print(rebuild(Path(sys.argv[1])))
