"""Scores of video files: decoded once, in a child process, and scored by the protocols of both papers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.subprocess_reader import StreamingReader, Unreadable, read_in_subprocess
from .data.video_reader import probe_video, read_pieces
from .metrics import protocols
from .metrics.judge import Judge
from .metrics.trace import Networks, Tracer, describe_weights

Row = Mapping[str, Any]  # of a manifest
COPIED = ("prompt_id", "seed", "system")  # of a manifest into every cell
PIECE = 32  # frames that are decoded at once
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


def score_rows(rows: Sequence[Row], folder: Path, networks: Networks, judge: Judge | None, how: Scoring) -> Iterator[list[dict[str, Any]]]:
    """Yield the cells of each row's video in `folder`; a video that can't be scored has one cell, without a metric, that says why."""
    weights = describe_weights(networks)
    # A file that crashes its reader costs a child process only: one decodes it to its end, another hands over its frames.
    paths = [folder / row["file"] for row in rows]
    with StreamingReader(read_pieces, timeout=how.timeout) as reader:
        for index, facts in read_in_subprocess(probe_video, paths, workers=1, timeout=how.timeout):
            row, path = rows[index], paths[index]
            key = {"video": row["file"], **{name: row[name] for name in COPIED if name in row}}
            try:
                if isinstance(facts, Unreadable):
                    raise ValueError(facts.sentence)
                stated = row.get("fps")
                if stated and abs(stated - facts.fps) > TOLERANCE * facts.fps:
                    raise ValueError(
                        f"{path.name} has {facts.fps:g} frames a second and the manifest says {stated:g}; correct the one that is wrong"
                    )
                cells = score_file(reader, path, facts, row, networks, judge, how)
            except ValueError as error:
                yield [key | {"protocol": None, "metric": None, "value": None, "failed": str(error)}]
                continue
            facts_of_run = {"frames": cells.pop("frames"), "fps": cells.pop("fps"), "md5": hash_md5(path), "weights": weights}
            yield [key | cell | facts_of_run for cell in cells["cells"]]


def score_file(reader: Any, path: Path, facts: Any, row: Row, networks: Networks, judge: Judge | None, how: Scoring) -> dict[str, Any]:
    """Decode a video once and return its cells, with its number of frames and their rate. `reader` streams frames from a child process."""
    fps = how.fps or facts.fps
    shape, count = {"height": facts.height, "width": facts.width, "fps": fps}, facts.count_frames(fps)
    if count < 2:
        raise ValueError(f"{path.name} has a single frame at {fps:g} fps; scores compare frames, give a video of at least 2")
    tracer = Tracer(networks, frames=count, **shape)
    for piece in reader.stream(path, size=PIECE, **shape):
        tracer.add(piece)
    trace = tracer.finish()
    wanted = [one for name in how.protocols for one in ([protocols.VBENCH] if name == "vbench" else [name])]
    prompt = row.get("prompt")
    cells = protocols.score_trace(trace, networks, wanted, prompt=prompt, chunk=how.chunk, window=how.window)
    if judge:
        cells.append(protocols.judge_video(trace, judge, prompt or "(not known)", key=row["file"], repeats=how.repeats))
    return {"cells": cells, "frames": trace.frames, "fps": trace.fps}


def hash_md5(file: Path) -> str:
    """Return the md5 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
