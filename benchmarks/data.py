"""CPU time of what happens to a clip before training: rendered, written, read, measured by the filter, encoded, and read for a step.

  python -m benchmarks data                a minute of one core; writes results/data.json
  python -m benchmarks data --scale 400    three minutes; writes results/filter-scale.json

Clips are worlds of profile tiny, 30 s of 32 x 32 at 16 frames a second; the latents' windows are those of stage base. With --scale: the
stage filter on so many rendered clips of 12 s, and what measuring costs beside decoding alone for clips of real sizes, which are the
same worlds, enlarged, with grain; and what the paper's 40,000 clips would cost.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.common.interleave import compare, interleave, summarize
from benchmarks.common.machine import describe_machine, write_result
from cf_model.codec.linear import LinearCodec
from cf_model.data import worlds
from cf_model.data.latents import Latents, write_latents
from cf_model.data.measures import measure_file
from cf_model.data.video import write_video
from cf_model.data.video_reader import probe_video, read_video
from tasks import filter as filtering
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.params.load import load_params

ROUNDS = 7
SIZES = ((480, 832, 16, 10.0), (720, 1280, 30, 5.0), (1080, 1920, 30, 3.0))  # height, width, frames a second, seconds
PAPER = {"clips": 40_000, "seconds": 15.0, "fps": 30, "height": 1080, "width": 1920}  # assumed: no paper says what its sources are


def measure_stage(count: int) -> dict[str, Any]:
    """Run the stage filter on rendered clips, once from nothing and once with a new clip; return CPU times and peaks of memory."""
    params = load_params(ROOT / "profiles/smoke.yaml")
    params = params.model_copy(update={"filter": params.filter.model_copy(update={"heldout": 0})})
    size: dict[str, Any] = {"height": params.video.height, "width": params.video.width, "fps": params.video.fps}
    with tempfile.TemporaryDirectory() as folder:
        clips, out = Path(folder) / "clips", Path(folder) / "manifest.jsonl"
        clips.mkdir()
        os.environ["CF_KEPT"] = str(Path(folder) / "kept")
        names = [f"clip-{number:05d}" for number in range(count + 1)]
        for number, name in enumerate(names):
            world = worlds.draw_world(number)
            write_video(
                clips / f"{name}.mp4", worlds.render_clip(world, params.clips.frames, **size), fps=params.video.fps, crf=params.clips.crf
            )
        decoded = time.process_time()
        for name in names[:count]:
            probe_video(clips / f"{name}.mp4")
        decoded = time.process_time() - decoded
        runs, track = [], MagicMock(facts={})
        for shown in (count // 4, count, count + 1):
            rows = [{"id": name, "file": f"{name}.mp4", "caption": "a red disc over blue hills", "source": None} for name in names[:shown]]
            (clips / "clips.jsonl").write_text(dump_json_lines(rows))
            before = _spent_seconds()
            filtering.run(params, track, clips=clips, out=out)
            runs.append({"clips": shown, "measured": track.facts["measured"], "cpu_seconds": round(_spent_seconds() - before, 2)})
            runs[-1]["resident_mib"] = _resident_mib()
        kept = sum(row["kept"] for row in read_json_lines(out))
    per_clip = (runs[0]["cpu_seconds"] + runs[1]["cpu_seconds"]) / count
    found = {"clips": count, "kept": kept, "runs": runs, "clips_per_second_per_core": round(1 / per_clip, 2)}
    return found | {"decode_only_clips_per_second_per_core": round(count / decoded, 2), "share": round(decoded / count / per_clip, 3)}


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
            path, frames = Path(folder) / "a.mp4", round(seconds * fps)
            video = worlds.render_clip(worlds.draw_world(3), frames, height=96, width=160, fps=fps)
            write_video(path, (_enlarge(frame, height, width, number) for number, frame in enumerate(video)), fps=fps, crf=23)
            ways = {"decode": lambda path=path: probe_video(path), "measure": lambda path=path: measure_file(path, fps=16)}
            spent = interleave(ways, rounds=rounds)
            row: dict[str, Any] = {"height": height, "width": width, "fps": fps, "seconds": seconds, "bytes": path.stat().st_size}
            row |= {name: summarize(values) for name, values in spent.items()}
            share = compare(spent, "measure", "decode")
            found.append(row | {"share": share["ratio"], "share_range": share["range"]})
            print(found[-1], flush=True)
    return found


def _enlarge(frame: np.ndarray, height: int, width: int, seed: int) -> np.ndarray:
    """Enlarge a picture to a size, with grain, so that the codec has something to code."""
    rows, columns = np.arange(height) * len(frame) // height, np.arange(width) * frame.shape[1] // width
    grain = np.random.default_rng(seed % 8).integers(-6, 7, (height, width, 1))
    return np.clip(frame[rows][:, columns] + grain, 0, 255).astype(np.uint8)


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


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, metavar="CLIPS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scale:
        found: dict[str, Any] = {"machine": describe_machine(), "filter": measure_stage(args.scale), "sizes": measure_sizes(rounds=5)}
        found["projection"] = project_paper(found["sizes"])
        print(found["filter"], found["projection"], sep="\n")
        write_result("filter-scale", found)
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
