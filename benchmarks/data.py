"""CPU time of what happens to a clip before training: rendered, written, read, measured by the filter, encoded, and read for a step.

  python -m benchmarks data                                   a minute of one core; writes results/data.json
  python -m benchmarks data --scale 2000 [--real FOLDER]      20 minutes; writes results/filter-scale.json

Clips are worlds of profile tiny, 30 s of 32 x 32 at 16 frames a second; the latents' windows are those of stage base. With --scale: the
stage filter on so many rendered clips of 12 s, and on half as many files of 11 s at the size of profile wan-1.3b; what measuring costs
beside decoding alone for clips of real sizes, which are the same worlds, enlarged, with grain, and for a folder's files; and what the
paper's 40,000 clips would cost.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import av
import numpy as np
import torch

from benchmarks.common.interleave import compare, interleave, summarize
from benchmarks.common.machine import describe_machine, write_result
from cf_model.codec.linear import LinearCodec
from cf_model.data import worlds
from cf_model.data.latent_writer import write_latents
from cf_model.data.latents import Latents
from cf_model.data.measures import measure_file
from cf_model.data.video import write_video
from cf_model.data.video_folder import VideoFolder
from cf_model.data.video_reader import probe_video, read_video
from tasks import filter as filtering
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.params.load import load_params
from tasks.params.schema import Params

ROUNDS = 7
SIZES = ((480, 832, 16, 10.0), (720, 1280, 30, 5.0), (1080, 1920, 30, 3.0))  # height, width, frames a second, seconds
DECODED, FILMS = 4, 20  # one file in so many is decoded alone; distinct films among the files of a real size
GRAIN = 2  # grey levels up and down; a picture of 832 x 480 then takes some 6 kB, real ones of that size 3 to 5
PAPER = {"clips": 40_000, "seconds": 15.0, "fps": 30, "height": 1080, "width": 1920}  # assumed: no paper says what its sources are


def measure_stage(count: int, write_clips: Callable[[Path, int, Params], list[str]], **rules: float) -> dict[str, Any]:
    """Run the stage filter on rendered clips, once from nothing and once with a new clip; return CPU times and peaks of memory.

    `write_clips` writes so many files to a folder and returns their names; `rules` are values of params.filter.
    """
    params = load_params(ROOT / "profiles/smoke.yaml")
    params = params.model_copy(update={"filter": params.filter.model_copy(update={"heldout": 0} | rules)})
    with tempfile.TemporaryDirectory() as folder:
        clips, out = Path(folder) / "clips", Path(folder) / "manifest.jsonl"
        clips.mkdir()
        os.environ["CF_KEPT"] = str(Path(folder) / "kept")
        files = write_clips(clips, count + 1, params)
        decoded, some = time.process_time(), files[:count:DECODED]
        facts = [probe_video(clips / file) for file in some][-1]
        decoded = (time.process_time() - decoded) / len(some)
        runs = []
        for shown in (count // 4, count, count + 1):
            rows = [{"id": file, "file": file, "caption": "a red disc over blue hills", "source": None} for file in files[:shown]]
            (clips / "clips.jsonl").write_text(dump_json_lines(rows))
            before, track = _spent_seconds(), _make_track()
            filtering.run(params, track, clips=clips, out=out)
            runs.append({"clips": shown, "measured": track.facts["measured"], "cpu_seconds": round(_spent_seconds() - before, 2)})
            runs[-1]["resident_mib"] = _resident_mib()
        kept = sum(row["kept"] for row in read_json_lines(out))
    per_clip = (runs[0]["cpu_seconds"] + runs[1]["cpu_seconds"]) / count
    found: dict[str, Any] = {"height": facts.height, "width": facts.width, "frames": facts.frames, "clips": count, "kept": kept}
    found |= {"runs": runs, "clips_per_second_per_core": round(1 / per_clip, 2)}
    found |= {"decode_only_clips_per_second_per_core": round(1 / decoded, 2), "share": round(decoded / per_clip, 3)}
    print(found, flush=True)
    return found


def write_worlds(folder: Path, count: int, params: Params) -> list[str]:
    """Render and write as many worlds of the profile's size; return the files' names."""
    size: dict[str, Any] = {"height": params.video.height, "width": params.video.width, "fps": params.video.fps}
    names = [f"clip-{number:05d}.mp4" for number in range(count)]
    for number, name in enumerate(names):
        video = worlds.render_clip(worlds.draw_world(number), params.clips.frames, **size)
        write_video(folder / name, video, fps=params.video.fps, crf=params.clips.crf)
    return names


def write_copies(folder: Path, count: int, params: Params) -> list[str]:
    """Write FILMS films of the size of profile wan-1.3b, and each again under other titles, because coding as many films takes an hour;
    return the files' names.
    """
    names = [f"clip-{number:05d}.mp4" for number in range(count)]
    for number, name in enumerate(names):
        source = folder / names[number % FILMS]
        if number < FILMS:
            write_film(source, number, height=480, width=832, fps=params.video.fps, frames=177)
            continue
        with av.open(str(source)) as one, av.open(str(folder / name), "w") as other:
            other.metadata["title"] = name
            stream = other.add_stream_from_template(one.streams.video[0])
            for packet in one.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    other.mux(packet)
    return names


def write_film(path: Path, seed: int, *, height: int, width: int, fps: int, frames: int) -> None:
    """Write a world at a real size, with grain."""
    video = worlds.render_clip(worlds.draw_world(seed), frames, height=height // 5, width=width // 5, fps=fps)
    write_video(path, _enlarge(video, height, width), fps=fps, crf=23)


def _enlarge(video: np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    """Enlarge pictures to a size, with grain, so that the codec has something to code."""
    rows, columns = np.arange(height) * video.shape[1] // height, np.arange(width) * video.shape[2] // width
    for number, frame in enumerate(np.clip(video, GRAIN, 255 - GRAIN) - GRAIN):
        yield frame[rows][:, columns] + _draw_grain(height, width, number % 8)


@cache
def _draw_grain(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2 * GRAIN + 1, (height, width, 1), np.uint8)


def _make_track() -> Any:
    """Return a stage's track that shows nothing and, unlike a mock, remembers no calls."""
    return SimpleNamespace(facts={}, progress=lambda *_, **__: SimpleNamespace(update=lambda: None))


def _spent_seconds() -> float:
    """Return the CPU time of this process and of its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def measure_sizes(rounds: int) -> list[dict[str, Any]]:
    """Return CPU time per clip of decoding alone and of measuring, which decodes too, for clips of real sizes."""
    found = []
    for height, width, fps, seconds in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"
            write_film(path, 3, height=height, width=width, fps=fps, frames=round(seconds * fps))
            row: dict[str, Any] = {"height": height, "width": width, "fps": fps, "seconds": seconds}
            found.append(row | time_file(path, rounds))
            print(found[-1], flush=True)
    return found


def measure_real(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the same of every file of a folder that can be read, and the median of their shares."""
    rows = []
    for path in VideoFolder(folder, VIDEO_SUFFIXES).videos:
        try:
            facts = probe_video(path)
        except ValueError:
            continue
        rows.append({"file": path.name, "height": facts.height, "width": facts.width, "frames": facts.frames} | time_file(path, rounds))
        print(rows[-1], flush=True)
    shares = [row["share"] for row in rows]
    return {"rows": rows, "median_share": round(statistics.median(shares), 3), "range": [min(shares), max(shares)]}


def time_file(path: Path, rounds: int) -> dict[str, Any]:
    """Return CPU times of decoding a file and of measuring it, and the share of the first in the second."""
    spent = interleave({"decode": lambda: probe_video(path), "measure": lambda: measure_file(path, fps=16)}, rounds=rounds)
    share = compare(spent, "measure", "decode")
    times = {name: summarize(values) for name, values in spent.items()}
    return {"bytes": path.stat().st_size} | times | {"share": share["ratio"], "share_range": share["range"]}


def project_paper(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Project the largest measured size to the paper's 40,000 clips: CPU time grows with the frames and pixels of the sources."""
    row, paper = rows[-1], SimpleNamespace(**PAPER)
    frames = paper.clips * paper.seconds * paper.fps
    per_frame = (
        row["measure"]["median_ms"] / 1000 / (row["seconds"] * row["fps"]) * (paper.height * paper.width) / (row["height"] * row["width"])
    )
    return PAPER | {
        "core_hours": round(frames * per_frame / 3600, 1),
        "assumed": "H.264 like the rendered clips; no time for reading disks",
    }


def measure_scale(count: int, real: Path | None) -> None:
    """Measure all of --scale; what is measured so far is written after each part, because they take minutes."""
    found: dict[str, Any] = {"machine": describe_machine(), "sizes": measure_sizes(rounds=5)}
    found["projection"] = project_paper(found["sizes"])
    if real:
        found["real"] = measure_real(real, rounds=5)
    # copies are let through, so that all files are compared with each other and remembered
    for name, write_clips, clips, rules in (
        ("small", write_worlds, count, {}),
        ("model_size", write_copies, count // 2, {"min_distance": 0.0}),
    ):
        found[name] = measure_stage(clips, write_clips, **rules)
        write_result("filter-scale", found)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, metavar="CLIPS")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="with --scale: measure its videos, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scale:
        measure_scale(args.scale, args.real)
        return
    params = load_params(ROOT / "profiles/tiny.yaml")
    size: dict[str, Any] = {"height": params.video.height, "width": params.video.width, "fps": params.video.fps}
    world, frames = worlds.draw_world(1), params.clips.frames
    codec = LinearCodec(params.codec.linear.channels, params.codec.linear.width).eval()
    with tempfile.TemporaryDirectory() as folder:
        file, latents = Path(folder) / "clip.mp4", Path(folder) / "latents"
        video = worlds.render_clip(world, frames, **size)
        write_video(file, video, fps=params.video.fps, crf=params.clips.crf)
        pixels = torch.from_numpy(video)[None]
        encoded = codec.encode(pixels)[0]
        clips = [{"id": f"{n}", "caption": "a", "split": "train"} for n in range(64)]
        rows = torch.zeros(1, params.text.tokens, params.text.channels)
        layout: dict[str, Any] = {"shard_mib": params.encode.shard_mib, "dtype": torch.float32, "fps": params.video.fps, "negative": ""}
        write_latents(latents, clips, lambda clip: (encoded, {}), lambda texts: rows.repeat(len(texts), 1, 1), **layout)
        read = Latents(latents)
        batch = list(range(params.base.batch))
        ways = {
            "render a world": lambda: worlds.render_clip(world, frames, **size),
            "write its mp4": lambda: write_video(file, video, fps=params.video.fps, crf=params.clips.crf),
            "read it": lambda: read_video(file, **size),
            "measure it (filter)": lambda: measure_file(file, fps=params.video.fps),
            "encode it to latents": lambda: codec.encode(pixels),
            "read a training batch": lambda: read.window(batch, [5 * n for n in batch], params.base.window),
        }
        spent = interleave(ways, rounds=ROUNDS)
    result = {"machine": describe_machine(), "profile": "tiny", "unit": "milliseconds of CPU time, of a clip of 30 s or of a batch"}
    result["rows"] = [{"what": name} | summarize(values) for name, values in spent.items()]
    for row in result["rows"]:
        print(row)
    write_result("data", result)


if __name__ == "__main__":
    main()
