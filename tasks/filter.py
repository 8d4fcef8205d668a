"""Stage `filter`: every clip is read to its end, once, as encode will read it, and accepted if it is fit to learn from."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from cf_model.codec.interface import TIME, video_frames
from cf_model.data.clip_judge import ClipJudge
from cf_model.data.clip_manifest import ManifestDraft
from cf_model.data.clip_pool import ClipPool
from cf_model.data.duplicates import DuplicateIndex
from cf_model.data.filter import ModelShape
from cf_model.data.measures import FileMeasures, load_measures, measure_to_bytes
from cf_model.data.networks import DESCRIBE, SCORE, ClipNetworks, load_network
from cf_model.data.scratch import open_scratch
from cf_model.data.subprocess_reader import Unreadable
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import stream_json_lines
from tasks.files.settings import read_settings
from tasks.params.schema import Filter, Params
from tasks.parts.clip_cache import ClipCache
from tasks.parts.needed_lengths import list_needed_lengths
from tasks.runner.track import Track

REFUSED = "refused.jsonl"  # rows of the last run that was refused, whose out the runner deletes
MODULES = tuple(f"cf_model.data.{name}" for name in ("measures", "video", "video_reader"))
SEARCHES = tuple(f"cf_model.data.{name}" for name in ("duplicates", "earlier_searches"))


def run(params: Params, track: Track, *, clips: Path, out: Path) -> dict[str, float]:
    """Write data/manifest.jsonl: a row for each clip, or each part between two cuts, with its values for every rule, and its split or
    the reason, value and rule of its rejection. The rows of a run that is refused are in refused.jsonl beside it, for `cf why`.
    """
    listed, needs = clips / "clips.jsonl", list_needed_lengths(params)
    if not listed.is_file():
        raise ValueError(f"{listed} is not there; run the stage clips first")
    shape = ModelShape(**params.video.model_dump(), frames=video_frames(needs.every[1]), latent=TIME)
    count = sum(1 for _ in stream_json_lines(listed))
    with closing(open_scratch(out.parent)) as database, open_networks(params.filter, shape) as networks:
        searches = ClipCache("duplicates", {}, modules=SEARCHES, libraries=("numpy",))
        accepted = DuplicateIndex(database, searches.entry_path("searches"))
        judge = ClipJudge(params.filter, shape, networks, compute_dvc_md5, accepted)
        draft, progress = ManifestDraft(database), track.progress(count, unit="clip")
        measures = measure_files(list_files(clips), params.filter, params.video.fps, track)
        for row, path, file in zip(stream_json_lines(listed), list_files(clips), measures, strict=True):
            draft.add(*judge.judge_file(row, path, file))
            progress.update()
        accepted.earlier.save()
        searches.sweep()
        track.facts["compared_with_all"] = accepted.full_searches
        refused = out.with_name(REFUSED)
        try:
            draft.check_accepted(str(clips), params.filter.heldout, held=needs.heldout)
            draft.split_heldout(params.filter.heldout, needs.heldout[1])
            draft.check_longest(needs.longest)
            refused.unlink(missing_ok=True)
        except ValueError:
            draft.write(refused)
            raise
        finally:
            draft.write(out)
        return draft.count_reasons()


def list_files(clips: Path) -> Iterator[Path]:
    """Yield the files of clips.jsonl, which is read again each time, because memory must not grow with the number of clips."""
    for row in stream_json_lines(clips / "clips.jsonl"):
        yield clips.absolute() / row["file"]  # workers of a cluster stand elsewhere


def measure_files(files: Iterable[Path], spec: Filter, fps: float, track: Track) -> Iterator[FileMeasures | Unreadable]:
    """Yield every file's measures, in the files' order; only files that no run has measured before are read."""
    cache = ClipCache("measures", {"fps": fps}, modules=MODULES, libraries=("av", "numpy"))
    pool, unreadable = ClipPool(spec.workers, spec.timeout, read_settings().dask), 0
    by_content = ((compute_dvc_md5(file), file) for file in files)
    for payload in pool.compute_payloads(cache, by_content, partial(measure_to_bytes, fps=fps)):
        unreadable += isinstance(payload, Unreadable)
        yield payload if isinstance(payload, Unreadable) else load_measures(payload)
    cache.sweep()
    track.facts["measured"] = cache.new_entries + unreadable


def open_networks(spec: Filter, shape: ModelShape) -> ClipNetworks:
    """Load the networks that params.filter names, and what they have said of clips before."""
    scorers = {one.name: load_network(f"filter.networks.{one.name}", one, SCORE) for one in spec.networks}
    captioner = load_network("filter.captioner", spec.captioner, DESCRIBE) if spec.captioner else None
    networks = ClipNetworks(scorers, captioner, shape, spec.timeout)
    if found := [*scorers.values(), *filter(None, [captioner])]:
        weights = [compute_dvc_md5(one.weights) for one in (*spec.networks, *filter(None, [spec.captioner]))]
        on = {"shape": (shape.height, shape.width, shape.fps), "scorers": [*scorers], "weights": weights}
        modules = ("cf_model.data.networks", "cf_model.data.video_reader", *(type(one).__module__ for one in found))
        networks.cache = ClipCache("networks", on, modules=modules, libraries=("av", "numpy"))
    return networks
