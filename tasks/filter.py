"""Stage `filter`: every clip is read to its end, once, as encode will read it, and accepted if it is fit to learn from."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cf_model.codec.interface import TIME, latent_frames, video_frames
from cf_model.data import filter as rules
from cf_model.data.duplicates import DuplicateIndex
from cf_model.data.measures import FileMeasures, dump_measures, load_measures, measure_file
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, dump_json_lines, read_json_lines
from tasks.params.schema import Filter, Params
from tasks.parts.clip_cache import ClipCache
from tasks.parts.needed_lengths import NeededLengths, list_needed_lengths
from tasks.runner.track import Track

MODULES = tuple(f"cf_model.data.{name}" for name in ("measures", "video", "video_reader"))


def run(params: Params, track: Track, *, clips: Path, out: Path) -> dict[str, float]:
    """Write data/manifest.jsonl: a row for each clip, or each part between two cuts, with its values for every rule, and its split or
    the reason, value and rule of its rejection. The manifest is written before a run is refused, so that `cf why` can explain it.
    """
    listed = clips / "clips.jsonl"
    if not listed.is_file():
        raise ValueError(f"{listed} is not there; run the stage clips first")
    # Only these keys, because `planted` is the answer: a filter that reads it would prove nothing.
    keys = ("id", "file", "caption", "source", "note", "refused")
    about = [{key: row[key] for key in keys if row.get(key) is not None} for row in read_json_lines(listed)]
    needs = list_needed_lengths(params)
    shape = rules.ModelShape(**params.video.model_dump(), frames=video_frames(needs.every[1]), latent=TIME)
    accepted, rows = DuplicateIndex(), list[Row]()
    progress = track.progress(len(about), unit="clip")
    measures = measure_files([clips / row["file"] for row in about], params.filter, params.video.fps, track)
    for row, file in zip(about, measures, strict=True):
        rows += judge_file(row, file, params.filter, shape, accepted)
        progress.update()
    try:
        check_accepted(rows, clips, params.filter.heldout, needs)
        split_heldout(rows, params.filter.heldout, needs.heldout[1])
    finally:
        out.write_text(dump_json_lines(rows, ensure_ascii=False), encoding="utf-8")
    return count_reasons(rows)


def measure_files(files: list[Path], spec: Filter, fps: float, track: Track) -> Iterator[FileMeasures | Unreadable]:
    """Yield every file's measures, in the files' order; only files that no run has measured before are read.

    # Choice: an unreadable file is tried again each time, because it may have been too slow for a busy machine.
    """
    cache = ClipCache("measures", {"fps": fps}, modules=MODULES, libraries=("av", "numpy"))
    contents = [compute_dvc_md5(file) for file in files]
    new = [i for i, content in enumerate(contents) if cache.get(content) is None]
    reading = read_in_subprocess(partial(measure_file, fps=fps), [files[i] for i in new], workers=spec.workers, timeout=spec.timeout)
    early: dict[int, FileMeasures | Unreadable] = {}  # results of files whose turn has not come: some files take longer than others
    waiting = set(new)
    for i, content in enumerate(contents):
        while i in waiting and i not in early:
            j, result = next(reading)
            early[new[j]] = result
            if isinstance(result, FileMeasures):
                cache.put(contents[new[j]], dump_measures(result))
        payload = None if i in waiting else cache.get(content)
        yield early.pop(i) if payload is None else load_measures(payload)
    reading.close()
    cache.sweep()
    track.facts["measured"] = len(new)


def judge_file(about: Row, file: FileMeasures | Unreadable, spec: Filter, shape: rules.ModelShape, accepted: DuplicateIndex) -> list[Row]:
    """Return the manifest's rows of a file, one for each part that is judged; accepted parts are added to `accepted`."""
    if sentence := about.get("refused"):
        about = {key: value for key, value in about.items() if key != "refused"}
        return [manifest_row(about, None, {}, rules.Rejection("caption", None, sentence))]
    if isinstance(file, Unreadable):
        return [manifest_row(about, None, {}, rules.Rejection("unreadable", None, file.sentence))]
    parts, rows = rules.split_at_cuts(file, spec), []
    for number, part in enumerate(parts, 1):
        row = about if len(parts) == 1 else about | {"id": f"{about['id']}-{number:03d}"}
        values = rules.list_values(file, part, about["caption"], shape)
        rejection = rules.find_broken_rule(file, part, values, spec, shape)
        signature = file.sign_part(part.first, part.end)
        twin = None
        if rejection is None:
            twin, rejection = rules.find_duplicate(signature, accepted, spec)
        if twin:
            values["duplicate"] = twin.distance
        if rejection is None:
            accepted.add(row["id"], signature)
        rows.append(manifest_row(row, (file, part), values, rejection))
    return rows


def manifest_row(
    about: Row, found: tuple[FileMeasures, rules.Part] | None, values: dict[str, float], rejection: rules.Rejection | None
) -> Row:
    """Return a clip's row of the manifest; `found` is None for a file that can't be read."""
    facts: dict[str, Any] = dict.fromkeys(("fps", "frames", "width", "height", "seconds", "start", "length", "latents"))
    if found:
        file, part = found
        of_file = file.facts
        length = of_file.length if part.length == file.frames else part.length / file.fps
        facts = {"fps": round(of_file.fps, 4), "frames": of_file.frames, "width": of_file.width, "height": of_file.height}
        facts |= {"seconds": round(float(length), 4), **rules.describe_part(file, part), "latents": latent_frames(part.length)}
        facts |= {"stream": of_file.stream} if of_file.stream else {}
    value = None if rejection is None or rejection.value is None else round(rejection.value, 4)
    reason, rule = (rejection.reason, rejection.rule) if rejection else (None, None)
    judged = {"kept": rejection is None, "reason": reason, "value": value, "rule": rule, "split": None}
    return about | facts | judged | {"values": {name: round(float(number), 4) for name, number in values.items()}}


def check_accepted(rows: list[Row], clips: Path, heldout: int, needs: NeededLengths) -> None:
    """Raise ValueError, with the reasons of rejection, if the accepted clips are too few, or too short for a later stage."""
    rejected = [row for row in rows if not row["kept"]]
    accepted = [row for row in rows if row["kept"]]
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(row["reason"] for row in rejected).most_common())
    first = f"; the first: {rejected[0].get('source', rejected[0]['file'])}, {rejected[0]['rule']}" if rejected else ""
    why = f"{counts or 'there is none to reject'}{first}"
    if not accepted:
        raise ValueError(f"no clip of {clips} passes the filter ({why}); add clips, or change filter in params.yaml")
    if len(accepted) <= heldout:
        problem = f"filter.heldout is {heldout}, but only {len(accepted)} of {clips} pass the filter ({why})"
        raise ValueError(f"{problem}; hold out fewer, or add clips")
    long = [row for row in accepted if row["latents"] >= needs.heldout[1]]
    if len(long) < heldout:
        name, latents = needs.heldout
        problem = f"filter.heldout is {heldout}, but only {len(long)} clips have {video_frames(latents)} frames, which {name} needs"
        raise ValueError(f"{problem}; hold out fewer, or add longer clips")
    name, latents = needs.longest
    longest = max(row["latents"] for row in accepted)
    if longest < latents:
        problem = f"{name} is {latents} latents, so {video_frames(latents)} frames, but the longest accepted clip has {longest}"
        raise ValueError(f"{problem} latents; add longer clips, or lower it")


def split_heldout(rows: list[Row], heldout: int, latents: int) -> None:
    """Set `split` of the accepted clips; held-out ones have at least `latents` latent frames.

    # Choice: by a hash of the id, so that new clips move few others between the sets; and different captions first, so
    # that the evaluation's prompts differ. All accepted parts of a file are on the same side.
    """
    accepted = sorted((row for row in rows if row["kept"]), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    able = [row for row in accepted if row["latents"] >= latents]
    first = list({row["caption"]: row for row in reversed(able)}.values())[::-1]
    unique = {row["id"] for row in first}
    chosen = {row["file"] for row in [*first, *(row for row in able if row["id"] not in unique)][:heldout]}
    for row in accepted:
        row["split"] = "heldout" if row["file"] in chosen else "train"


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
        **{f"rejected_{reason}": reasons[reason] for reason in rules.REASONS},
    }
