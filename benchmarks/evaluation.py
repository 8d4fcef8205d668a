"""CPU time of the evaluation of one video of 15.6 s at profile tiny, metric by metric, and of minutes at 832 x 480, with their memory.

  python -m benchmarks evaluation --videos 2      some minutes of one core for each video; writes results/evaluation.json

The minutes are made of the real clips in the folder CF_CLIPS; without one, their rows of an earlier run stay. What 100 videos need is
projected: so many times the CPU time of a video, and the memory of the videos that were measured, if it did not grow from one to the next.
"""

from __future__ import annotations

import argparse
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
WAYS = ("decoding alone", "all protocols, pooled pixels", "another protocol, features kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=2, help="minutes that are scored one after another; default: 2")
    many = parser.parse_args().videos
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
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "profile": "tiny",
        "unit": f"milliseconds of CPU time a video of {frames} frames",
    }
    result["rows"] = [{"what": name} | summarize(values) for name, values in spent.items()]
    clips = read_settings().clips
    result["minute"] = measure_minutes(clips, many) if clips and clips.is_dir() else read_result("evaluation").get("minute", {})
    for row in (*result["rows"], *result["minute"].get("rows", [])):
        print(row)
    write_result("evaluation", result)


def measure_minutes(clips: Path, count: int) -> dict[str, Any]:
    """Score `count` videos of a minute at 832 x 480, made of real clips, in each of WAYS, and each of these in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_video(folder / "minute-0.mp4", islice(repeat_clips(clips), MINUTE), fps=RATE, crf=20)
        whole = (folder / "minute-0.mp4").read_bytes()
        for number in range(1, count):  # an empty box at the end, which players skip, makes it a file of another hash
            (folder / f"minute-{number}.mp4").write_bytes(whole + b"\x00\x00\x00\x08free" * number)
        rows = []
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append({"what": way} | pool.submit(spend_on_videos, way, folder, count).result())
            print(rows[-1], flush=True)
    return {"machine": describe_machine(), "video": f"{MINUTE} frames of 832 x 480, {RATE} fps, H.264", "videos": count, "rows": rows}


def repeat_clips(clips: Path) -> Iterator[np.ndarray]:
    """Yield the frames of all clips of this size, again and again."""
    for path in cycle(sorted(clips.glob("mixkit-*.mp4"))):
        for piece in read_pieces(path, fps=RATE, size=PIECE, **SIZE):
            yield from piece


def spend_on_videos(way: str, folder: Path, count: int) -> dict[str, Any]:
    """Return the seconds of CPU time a video and their projection, and the peak of memory: at the end, and after each video.

    The peak at the end is of this process and its largest child; that after each video, of this process and its children together.
    """
    torch.set_num_threads(1)
    before, files, peaks = read_cpu_seconds(), [f"minute-{number}.mp4" for number in range(count)], []
    if way == WAYS[0]:
        with StreamingReader(read_pieces, timeout=600) as reader:
            for file in files:
                for _ in reader.stream(folder / file, size=PIECE, fps=float(RATE), **SIZE):
                    pass
                peaks.append(read_peak_mib())
    else:
        protocols = ("windows",) if way == WAYS[2] else ("vbench", "vbench-long", "vbench-competition", "windows", "own")
        networks = open_networks(None, torch.device("cpu"))
        rows = [{"file": file} for file in files]
        for cells in score_rows(rows, folder, networks, None, Scoring(protocols, None, 3, 21, 1, 600), features=folder / "features"):
            assert all(cell["value"] is not None for cell in cells), cells
            peaks.append(read_peak_mib())
    spent = (read_cpu_seconds() - before) / count
    largest = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    hours = round(spent * MANY / 3600, 2)
    return {"cpu_s_a_video": round(spent, 2), "peak_mib": round(largest), "peak_mib_after_each": peaks, f"cpu_h_of_{MANY}": hours}


def read_cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def read_peak_mib() -> int:
    """Return the largest memory that this process and each of its living children have had, added up."""
    pids = ["self", *(pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return round(sum(int(line.split()[1]) for line in lines) / 1024)


if __name__ == "__main__":
    main()
