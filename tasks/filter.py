"""Stage `filter`: every clip is read to its end, once, and accepted if it is fit to learn from."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cf_model.data.filter import REASONS, ClipMeasures, Rejection, find_broken_rule, measure_clip
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, dump_json_lines, read_json_lines
from tasks.params.schema import Filter, Params
from tasks.parts.clip_cache import ClipCache
from tasks.runner.track import Track


def run(params: Params, track: Track, *, clips: Path, out: Path) -> dict[str, float]:
    """Write data/manifest.jsonl: for each clip of data/clips its facts and split, or the reason, value and rule of its rejection."""
    listed = clips / "clips.jsonl"
    if not listed.is_file():
        raise ValueError(f"{listed} is not there; run the stage clips first")
    # Only these keys, because `planted` is the answer: a filter that reads it would prove nothing.
    keys = ("id", "file", "caption", "source")
    about = [{key: row[key] for key in keys if row.get(key) is not None} for row in read_json_lines(listed)]
    rules, progress = params.filter, track.progress(len(about), unit="clip")
    measures = measure_files([clips / row["file"] for row in about], rules, track, progress.update)
    signatures: dict[str, np.ndarray] = {}
    rows = []
    for row, clip in zip(about, measures, strict=True):
        if isinstance(clip, Unreadable):
            rejection: Rejection | None = Rejection("unreadable", None, clip.sentence)
        else:
            rejection = find_broken_rule(clip, signatures, rules)
            if rejection is None:
                signatures[row["id"]] = clip.signature
        rows.append(manifest_row(row, clip, rejection))
    check_accepted(rows, clips, rules.heldout)
    split_heldout(rows, rules.heldout)
    out.write_text(dump_json_lines(rows, ensure_ascii=False), encoding="utf-8")
    return count_reasons(rows)


def measure_files(files: list[Path], rules: Filter, track: Track, tell: Callable[[], object]) -> list[ClipMeasures | Unreadable]:
    """Measure every file, and call `tell` after each; only files that no run has measured before are read.

    # Choice: an unreadable file is tried again each time, because it may have been too slow for a busy machine.
    """
    cache = ClipCache("measures", {}, modules=("cf_model.data.filter", "cf_model.data.video"), libraries=("av", "decord", "numpy"))
    contents = [compute_dvc_md5(file) for file in files]
    measures: dict[int, ClipMeasures | Unreadable] = {}
    for i, content in enumerate(contents):
        if payload := cache.get(content):
            values = json.loads(payload)
            measures[i] = ClipMeasures(**values | {"signature": np.asarray(values["signature"], np.uint8)})
            tell()
    new = [i for i in range(len(files)) if i not in measures]
    for j, result in read_in_subprocess(measure_clip, [files[i] for i in new], workers=rules.workers, timeout=rules.timeout):
        measures[new[j]] = result
        if isinstance(result, ClipMeasures):
            values = vars(result) | {"signature": result.signature.tolist()}
            cache.put(contents[new[j]], json.dumps(values, sort_keys=True).encode())
        tell()
    cache.sweep()
    track.facts["measured"] = len(new)
    return [measures[i] for i in range(len(files))]


def manifest_row(about: Row, clip: ClipMeasures | Unreadable, rejection: Rejection | None) -> Row:
    """Return a clip's row of the manifest."""
    names = ("fps", "frames", "width", "height", "seconds")
    facts = {key: None if isinstance(clip, Unreadable) else round(getattr(clip, key), 4) for key in names}
    value = None if rejection is None or rejection.value is None else round(rejection.value, 4)
    reason, rule = (rejection.reason, rejection.rule) if rejection else (None, None)
    return about | facts | {"kept": rejection is None, "reason": reason, "value": value, "rule": rule, "split": None}


def check_accepted(rows: list[Row], clips: Path, heldout: int) -> None:
    """Raise ValueError, with the reasons of rejection, if too few clips were accepted to hold some out and train on others."""
    rejected = [row for row in rows if not row["kept"]]
    accepted = len(rows) - len(rejected)
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(row["reason"] for row in rejected).most_common())
    first = f"; the first: {rejected[0].get('source', rejected[0]['file'])}, {rejected[0]['rule']}" if rejected else ""
    why = f"{counts or 'there is none to reject'}{first}"
    if not accepted:
        raise ValueError(f"no clip of {clips} passes the filter ({why}); add clips, or change filter in params.yaml")
    if accepted <= heldout:
        problem = f"filter.heldout is {heldout}, but only {accepted} of {clips} pass the filter ({why})"
        raise ValueError(f"{problem}; hold out fewer, or add clips")


def split_heldout(rows: list[Row], heldout: int) -> None:
    """Set `split` of the accepted clips.

    # Choice: by a hash of the id, so that new clips move few others between the sets; and different captions first, so
    # that the evaluation's prompts differ.
    """
    accepted = sorted((row for row in rows if row["kept"]), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    first = list({row["caption"]: row for row in reversed(accepted)}.values())[::-1]
    unique = {row["id"] for row in first}
    chosen = {row["id"] for row in [*first, *(row for row in accepted if row["id"] not in unique)][:heldout]}
    for row in accepted:
        row["split"] = "heldout" if row["id"] in chosen else "train"


def count_reasons(rows: list[Row]) -> dict[str, float]:
    """Return the stage's metrics: clips accepted, their seconds and splits, and rejections by reason."""
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    accepted = [row for row in rows if row["kept"]]
    return {
        "clips": len(rows),
        "kept": len(accepted),
        "kept_seconds": sum(row["seconds"] for row in accepted),
        "train": sum(row["split"] == "train" for row in accepted),
        "heldout": sum(row["split"] == "heldout" for row in accepted),
        **{f"rejected_{reason}": reasons[reason] for reason in REASONS},
    }
