"""CPU time of the evaluation of one video of 15.6 s at profile tiny, metric by metric, and of a minute at 832 x 480, with its memory.

  python -m benchmarks evaluation            some minutes of one core; writes results/evaluation.json

The minute is made of the real clips in the folder CF_CLIPS; without one, its rows of an earlier run stay.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.common.interleave import interleave, summarize
from benchmarks.common.machine import describe_machine, read_result, write_result
from cf_model.codec.interface import video_frames
from cf_model.data import worlds
from cf_model.data.subprocess_reader import StreamingReader
from cf_model.data.video import write_video
from cf_model.data.video_reader import read_pieces
from cf_model.evaluate import course, oracle, places, scores
from cf_model.metrics.trace import open_networks
from cf_model.scoring import PIECE, Scoring, score_rows
from tasks.files.settings import read_settings
from tasks.params.load import load_params

ROUNDS, LATENTS, PREFIX = 7, 63, 81  # frames of a real prefix
SIZE, RATE, MINUTE = {"height": 480, "width": 832}, 16, 961  # frames of a minute, as a student of 81 chunks makes them
MANY = 100  # videos that are projected


def main() -> None:
    torch.set_num_threads(1)
    params = load_params(ROOT / "profiles/tiny.yaml")
    fps, frames, world = params.video.fps, video_frames(LATENTS), worlds.draw_world(1)
    video = worlds.render_clip(world, frames, height=params.video.height, width=params.video.width, fps=fps)
    truth, kept = world.truth(frames, fps), oracle.find_bins_in_view(video[: video_frames(params.evaluate.sink)])
    rules: dict[str, Any] = params.evaluate.model_dump(include={"gap", "absence"})
    found, speed = oracle.read_frames(video), places.find_speed(truth, fps)
    visits, absence = oracle.find_visits(video, found.heading), params.evaluate.absence
    where: dict[str, Any] = {"prefix": PREFIX, "fps": fps, "kept": kept}
    whole: dict[str, Any] = rules | {"fps": fps, "sink": params.evaluate.sink, "chunk": 3}
    back: dict[str, Any] = where | {"absence": absence, "speed": speed}
    ways = {
        "all metrics of a video (score_video)": lambda: scores.score_video(video, truth, PREFIX, **whole),
        "what its frames show (read_frames)": lambda: oracle.read_frames(video),
        "the caption (prompt_metrics)": lambda: oracle.prompt_metrics(found, truth, fps),
        "visits to headings (find_visits)": lambda: oracle.find_visits(video, found.heading),
        "what comes back (memory_metrics)": lambda: oracle.memory_metrics(visits, fps, absence, kept=kept),
        "the map after a prefix (map_metrics)": lambda: oracle.map_metrics(visits, truth, unit=1, **where, **rules),
        "places by their landmarks (score_places)": lambda: places.score_places(video, found.heading, **back),
        "drift, seams, repetition (score_course)": lambda: course.score_course(video, found.motion, fps, prefix=PREFIX, borders=None),
    }
    spent = interleave(ways, rounds=ROUNDS)
    result = {"machine": describe_machine(), "profile": "tiny", "unit": f"milliseconds of CPU time a video of {frames} frames"}
    result["rows"] = [{"what": name} | summarize(values) for name, values in spent.items()]
    clips = read_settings().clips
    result["minute"] = measure_minute(clips) if clips and clips.is_dir() else read_result("evaluation").get("minute", {})
    for row in (*result["rows"], *result["minute"].get("rows", [])):
        print(row)
    write_result("evaluation", result)


def measure_minute(clips: Path) -> dict[str, Any]:
    """Score a minute at 832 x 480, made of real clips, by decoding alone and by all protocols, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "minute.mp4", islice(repeat_clips(clips), MINUTE), fps=RATE, crf=20)
        rows = []
        for way in ("decoding alone", "all protocols, pooled pixels", "another protocol, features kept"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                cpu, peak = pool.submit(spend_on_video, way, Path(folder)).result()
            rows.append({"what": way, "cpu_s": round(cpu, 2), "peak_mib": round(peak), f"cpu_h_of_{MANY}": round(cpu * MANY / 3600, 2)})
    return {"machine": describe_machine(), "video": f"{MINUTE} frames of 832 x 480, {RATE} fps, H.264", "rows": rows}


def repeat_clips(clips: Path) -> Iterator[np.ndarray]:
    """Yield the frames of all clips of this size, again and again."""
    for path in cycle(sorted(clips.glob("mixkit-*.mp4"))):
        for piece in read_pieces(path, fps=RATE, size=PIECE, **SIZE):
            yield from piece


def spend_on_video(way: str, folder: Path) -> tuple[float, float]:
    """Return seconds of CPU time and the peak of memory in MiB, of this process and its largest child, for the folder's video."""
    torch.set_num_threads(1)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    before = sum(one.ru_utime + one.ru_stime for one in used)
    if way == "decoding alone":
        with StreamingReader(read_pieces, timeout=600) as reader:
            for _ in reader.stream(folder / "minute.mp4", size=PIECE, fps=float(RATE), **SIZE):
                pass
    else:
        protocols = ("windows",) if "another" in way else ("vbench", "vbench-long", "vbench-competition", "windows", "own")
        how = Scoring(protocols, None, 3, 21, 1, 600)
        networks = open_networks(None, torch.device("cpu"))
        list(score_rows([{"file": "minute.mp4"}], folder, networks, None, how, features=folder / "features"))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) - before, sum(one.ru_maxrss for one in used) / 1024


if __name__ == "__main__":
    main()
