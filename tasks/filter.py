"""filter: reads every clip to its end, once, and keeps those that are fit to learn from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cf_model.data.filter import REASONS, ClipMeasures, Rejection, find_broken_rule, measure_clip
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tasks.params.schema import Params
from tasks.parts.clip_cache import ClipCache, digest
from tasks.runner.track import Track

Row = dict[str, Any]


def run(params: Params, track: Track, *, clips: Path, out: Path) -> dict[str, float]:
    """Writes data/manifest.jsonl: for each clip of data/clips whether it was kept, or why not, with value and rule."""
    listed = clips / "clips.jsonl"
    if not listed.is_file():
        raise ValueError(f"{listed} is not there; run the stage clips first")
    stated = map(json.loads, listed.read_text(encoding="utf-8").splitlines())
    # only these keys: `planted` says what a clip is, and would make the filter's success worthless
    about = [{key: row[key] for key in ("id", "file", "caption", "source") if row.get(key) is not None} for row in stated]
    rules, progress = params.filter, track.progress(len(about), unit="clip")
    found = measure_files([clips / row["file"] for row in about], rules.workers, rules.timeout, track, progress.update)
    signatures: dict[str, np.ndarray] = {}
    rows = []
    for i, row in enumerate(about):
        clip = found[i]
        if isinstance(clip, Unreadable):
            rejection: Rejection | None = Rejection("unreadable", None, clip.sentence)
        else:
            rejection = find_broken_rule(clip, signatures, rules)
            if rejection is None:
                signatures[row["id"]] = clip.signature
        rows.append(manifest_row(row, clip, rejection))
    check_accepted(rows, clips, rules.heldout)
    split_heldout(rows, rules.heldout)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return count_reasons(rows)


def measure_files(
    files: list[Path], workers: int, timeout: float, track: Track, tell: Callable[[], object]
) -> list[ClipMeasures | Unreadable]:
    """Of every file; only those are read that no run has read before.

    # Choice: what couldn't be read is tried again each time. It may have been too slow for a busy machine.
    """
    kept = ClipCache("measures", {}, modules=("cf_model.data.filter", "cf_model.data.video"), libraries=("av", "decord", "numpy"))
    contents = [digest(file) for file in files]
    found: dict[int, ClipMeasures | Unreadable] = {}
    for i, content in enumerate(contents):
        if payload := kept.get(content):
            found[i] = load_measures(payload)
            tell()
    new = [i for i in range(len(files)) if i not in found]
    for j, result in read_in_subprocess(measure_clip, [files[i] for i in new], workers=workers, timeout=timeout):
        found[new[j]] = result
        if isinstance(result, ClipMeasures):
            kept.put(contents[new[j]], dump_measures(result))
        tell()
    kept.sweep()
    track.facts["measured"] = len(new)
    return [found[i] for i in range(len(files))]


def dump_measures(clip: ClipMeasures) -> bytes:
    values = vars(clip) | {"signature": clip.signature.tolist()}
    return json.dumps(values, sort_keys=True).encode()


def load_measures(payload: bytes) -> ClipMeasures:
    values = json.loads(payload)
    return ClipMeasures(**values | {"signature": np.asarray(values["signature"], np.uint8)})


def manifest_row(about: Row, clip: ClipMeasures | Unreadable, rejection: Rejection | None) -> Row:
    known = ("fps", "frames", "width", "height", "seconds")
    facts = {key: None if isinstance(clip, Unreadable) else round(getattr(clip, key), 4) for key in known}
    value = None if rejection is None or rejection.value is None else round(rejection.value, 4)
    reason, rule = (rejection.reason, rejection.rule) if rejection else (None, None)
    return about | facts | {"kept": rejection is None, "reason": reason, "value": value, "rule": rule, "split": None}


def check_accepted(rows: list[Row], clips: Path, heldout: int) -> None:
    rejected = [row for row in rows if not row["kept"]]
    kept = len(rows) - len(rejected)
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(row["reason"] for row in rejected).most_common())
    first = f"; the first: {rejected[0].get('source', rejected[0]['file'])}, {rejected[0]['rule']}" if rejected else ""
    why = f"{counts or 'there is none to reject'}{first}"
    if not kept:
        raise ValueError(f"no clip of {clips} passes the filter ({why}); add clips, or change filter in params.yaml")
    if kept <= heldout:
        raise ValueError(f"filter.heldout is {heldout}, but only {kept} of {clips} pass the filter ({why}); hold out fewer, or add clips")


def split_heldout(rows: list[Row], heldout: int) -> None:
    """Sets `split` of the kept clips.

    # Choice: by a hash of the id, so that adding clips moves few between the sets, and different captions first, so that
    # the evaluation's prompts differ.
    """
    kept = sorted((row for row in rows if row["kept"]), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    first = list({row["caption"]: row for row in reversed(kept)}.values())[::-1]
    unique = {row["id"] for row in first}
    chosen = {row["id"] for row in [*first, *(row for row in kept if row["id"] not in unique)][:heldout]}
    for row in kept:
        row["split"] = "heldout" if row["id"] in chosen else "train"


def count_reasons(rows: list[Row]) -> dict[str, float]:
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    kept = [row for row in rows if row["kept"]]
    return {
        "clips": len(rows),
        "kept": len(kept),
        "kept_seconds": sum(row["seconds"] for row in kept),
        "train": sum(row["split"] == "train" for row in kept),
        "heldout": sum(row["split"] == "heldout" for row in kept),
        **{f"rejected_{reason}": reasons[reason] for reason in REASONS},
    }
