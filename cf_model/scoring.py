"""Scores of video files: decoded once, in a child process, and scored by the protocols of both papers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import metrics
from .data.subprocess_reader import StreamingReader, Unreadable, read_in_subprocess
from .data.video_reader import probe_video, read_pieces
from .evaluate.cells import Cell, hash_code, hash_facts, select_item
from .evaluate.statistics import Interval, bootstrap_ratio
from .metrics import drift, encoders, flow, long, preprocess, protocols, repetition, summary, vbench, windowed
from .metrics import trace as tracing
from .metrics.judge import RUBRIC_HASH, Judge, count_ratings
from .metrics.manifest import describe_row
from .metrics.trace import Networks, Trace, Tracer, describe_weights
from .metrics.trace_file import describe_trace, read_trace, write_trace

Row = Mapping[str, Any]  # of a manifest
RESAMPLES = 1000  # of the intervals that are printed
PIECE = 32  # frames that are decoded at once
TRACING = (tracing, encoders, preprocess, drift, flow, repetition, vbench, windowed, long)  # the code that a trace depends on
TOLERANCE = 0.01  # by which the manifest's frames a second may differ from the file's, as a part of them


@dataclass(frozen=True)
class Scoring:
    """How videos are scored."""

    protocols: Sequence[str]
    fps: float | None  # that all videos are resampled to; None: each at its own
    chunk: int | None  # latent frames of a chunk and of the window, for seams
    window: int | None
    repeats: int  # ratings of the judge
    timeout: float  # seconds in which a video must be readable


def score_rows(
    rows: Sequence[Row],
    folder: Path,
    networks: Networks,
    judge: Judge | None,
    how: Scoring,
    finished: Sequence[Cell] = (),
    features: Path | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the cells of each row's video in `folder`; a video that can't be scored has one cell, without a metric, that says why.

    Cells of `finished`, an earlier scoring, stand for videos whose file, weights, code and settings are the same and of which none
    failed; they come first. In the folder `features` is kept what was measured of each video: there a video that is scored once more, by
    another protocol or judge, is not decoded again.
    """
    paths, shared = [folder / row["file"] for row in rows], describe_scoring(networks, judge, how)
    hashes = [hash_md5(path) if path.is_file() else None for path in paths]
    keys = [describe_row(row) | {"md5": found} | shared for row, found in zip(rows, hashes, strict=True)]
    before: dict[str, list[dict[str, Any]]] = {}
    for cell in finished:
        before.setdefault(str(cell.get("file")), []).append(dict(cell))
    todo = []
    for index, key in enumerate(keys):
        cells = before.get(key["file"], [])
        same = all(cell.get(name) == value for cell in cells for name, value in key.items())
        kept = locate_trace(features, networks, key["md5"], how.fps)
        if cells and same and not any("failed" in cell for cell in cells):
            yield cells
        elif kept and (found := read_trace(kept[0])):
            yield list(rate_trace(found[0], found[1]["source_fps"], key, rows[index], networks, judge, how))
        else:
            todo.append(index)
    # A file that crashes its reader costs a child process only: one decodes it to its end, another hands over its frames.
    with StreamingReader(read_pieces, timeout=how.timeout) as reader:
        for number, facts in read_in_subprocess(probe_video, [paths[index] for index in todo], workers=1, timeout=how.timeout):
            index = todo[number]
            key, row, path = keys[index], rows[index], paths[index]
            try:
                if isinstance(facts, Unreadable):
                    raise ValueError(facts.sentence)
                check_rate(row, facts.fps)
                trace = decode_trace(reader, path, facts, networks, how)
                if kept := locate_trace(features, networks, key["md5"], how.fps):
                    write_trace(kept[0], trace, kept[1] | {"source_fps": facts.fps})
                cells = list(rate_trace(trace, facts.fps, key, row, networks, judge, how))
            except ValueError as error:
                cells = [fail_video(key, error)]
            yield cells


def fail_video(key: Mapping[str, Any], error: ValueError) -> dict[str, Any]:
    """Return the one cell of a video that can't be scored, which says why."""
    return {**key, "protocol": None, "metric": None, "value": None, "failed": str(error)}


def check_rate(row: Row, fps: float) -> None:
    """Raise ValueError if the manifest states another rate than the file has."""
    stated, name = row.get("fps"), Path(row["file"]).name
    if stated and abs(stated - fps) > TOLERANCE * fps:
        raise ValueError(f"{name} has {fps:g} frames a second and the manifest says {stated:g}; correct the one that is wrong")


def locate_trace(features: Path | None, networks: Networks, md5: str | None, fps: float | None) -> tuple[Path, dict[str, Any]] | None:
    """Return the file in which a video's trace is kept and what it depends on; None where none is kept."""
    about = describe_trace(networks, md5, fps, hash_code(*TRACING)) if features and md5 else None
    return (features / f"{hash_facts(about)}.safetensors", about) if features and about else None


def describe_scoring(networks: Networks, judge: Judge | None, how: Scoring) -> dict[str, Any]:
    """Return all that scores depend on besides the video: weights, code and settings, as JSON gives them back."""
    settings = asdict(how) | {"protocols": list(how.protocols), "judge": judge.name if judge else None}
    del settings["timeout"]  # which changes no score
    if judge:
        settings |= {"rubric": RUBRIC_HASH, "answers": hash_facts(getattr(judge, "answers", None))}  # recorded ones
    return {"weights": dict(describe_weights(networks)), "code": hash_code(metrics, sys.modules[__name__]), "settings": settings}


def decode_trace(reader: Any, path: Path, facts: Any, networks: Networks, how: Scoring) -> Trace:
    """Decode a video once and return its trace. `reader` streams frames from a child process."""
    fps = how.fps or facts.fps
    shape, count = {"height": facts.height, "width": facts.width, "fps": fps}, facts.count_frames(fps)
    if count < 2:
        raise ValueError(f"{path.name} has a single frame at {fps:g} fps; scores compare frames, give a video of at least 2")
    tracer = Tracer(networks, frames=count, **shape)
    for piece in reader.stream(path, size=PIECE, **shape):
        tracer.add(piece)
    return tracer.finish()


def rate_trace(trace: Trace, source_fps: float, key: Mapping[str, Any], row: Row, networks: Networks, judge: Judge | None,
               how: Scoring) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield the cells of a traced video, or the one that says why it can't be scored. `source_fps` is the file's own rate."""
    try:
        check_rate(row, source_fps)
        wanted = [one for name in how.protocols for one in ([protocols.VBENCH] if name == "vbench" else [name])]
        prompt = row.get("prompt")
        cells = protocols.score_trace(trace, networks, wanted, prompt=prompt, chunk=how.chunk, window=how.window)
        if judge:
            cells.append(protocols.judge_video(trace, judge, prompt or "(not known)", key=row["file"], repeats=how.repeats))
    except ValueError as error:
        yield fail_video(key, error)
        return
    yield from ({**key, **cell, "frames": trace.frames, "fps": trace.fps} for cell in cells)


def hash_md5(file: Path) -> str:
    """Return the md5 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def average_systems(cells: Sequence[Cell], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each suite, system, protocol and metric: mean by the protocol's own rule, interval over prompts, n, failures."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell["metric"]:
            groups.setdefault((cell["suite"], str(cell["system"] or ""), cell["protocol"], cell["metric"]), []).append(cell)
    rows = []
    for (suite, system, protocol, metric), members in groups.items():
        good = [cell for cell in members if cell["value"] is not None]
        row = {"suite": suite, "system": system, "protocol": protocol, "metric": metric, "videos": len(good)}
        row |= {"prompts": len({select_item(cell) for cell in good}), "failed": len(members) - len(good)}
        rows.append(row | {"interval": average_weighted(good, resamples=resamples, seed=seed)})
    return rows


def average_weighted(cells: Sequence[Cell], *, resamples: int, seed: int) -> Interval | None:
    """Return the mean of one metric's cells, weighted as their protocol weighs videos, with its interval; None without a cell."""
    weights = {(select_item(cell), number): summary.weigh_video(cell) for number, cell in enumerate(cells)}
    sums = {key: weight * cell["value"] for (key, weight), cell in zip(weights.items(), cells, strict=True)}
    return bootstrap_ratio(sums, weights, resamples=resamples, seed=seed)


def describe_scores(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield lines for a terminal: each system's means with interval and n, its totals or the sentences that refuse them, and failures."""
    for row in average_systems(cells, resamples=RESAMPLES, seed=0):
        interval, who = row["interval"], f"{row['system']} {row['protocol']}".lstrip()
        mean = "–" if interval is None else f"{interval.mean:.4f}"
        ends = f"[{interval.low:.4f}, {interval.high:.4f}]" if interval and interval.has_ends else ""
        failed = f", {row['failed']} failed" if row["failed"] else ""
        yield f"{who:<44} {row['metric']:<46} {mean:>10} {ends:<20} n = {row['videos']} of {row['prompts']} prompts{failed}"
    yield from describe_judges(cells)
    for system in dict.fromkeys(cell["system"] for cell in cells):
        own = [cell for cell in cells if cell["system"] == system]
        for name, value in summary.total_scores(summary.average_cells(own), sum(cell["metric"] is None for cell in own)).items():
            yield f"{system or ''} {name}: {value if isinstance(value, str) else f'{value:.2f}'}".lstrip()
    yield from (f"not scored: {cell['failed']}" for cell in cells if cell["metric"] is None)


def describe_judges(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for each system and judge: how often each rating was given, answers without one, and how far repeats agree."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if "answers" in cell:
            groups.setdefault((str(cell["system"] or ""), cell["metric"]), []).append(cell)
    for (system, metric), members in groups.items():
        counts, without = count_ratings([text for cell in members for text in cell["answers"]])
        ratings = ", ".join(f"{score} x {count}" for score, count in enumerate(counts))
        agreements = [cell["agreement"] for cell in members if "agreement" in cell and len(cell["answers"]) > 1]
        agree = f", repeats of a video agree in {sum(agreements) / len(agreements):.0%}" if agreements else ""
        yield f"{system} {metric}: ratings {ratings}; answers without a rating: {without}{agree}".lstrip()
