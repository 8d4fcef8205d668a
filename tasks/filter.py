"""Stage `filter`: every clip is read to its end, once, as encode will read it, and accepted if it is fit to learn from."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cf_model.codec.interface import TIME, video_frames
from cf_model.data import filter as rules
from cf_model.data.clip_manifest import check_accepted, count_reasons, manifest_row, split_heldout
from cf_model.data.duplicates import DuplicateIndex
from cf_model.data.measures import FileMeasures, dump_measures, load_measures, measure_file
from cf_model.data.subprocess_reader import Unreadable, read_in_subprocess
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import Row, dump_json_lines, read_json_lines
from tasks.params.schema import Filter, Params
from tasks.parts.clip_cache import ClipCache
from tasks.parts.needed_lengths import list_needed_lengths
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
    keys = ("id", "file", "caption", "source", "note", "refused", "from", "to")
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
        check_accepted(rows, str(clips), params.filter.heldout, held=needs.heldout, longest=needs.longest)
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
    parts, rows = rules.split_at_cuts(file, spec, about.get("from"), about.get("to")), []
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
