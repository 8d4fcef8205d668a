"""Memory of the stages clips, filter and encode by the number of clips. No file is decoded: the filter judges and compares all clips from
prepared measures, and encode writes latents of a few numbers.

  python -m benchmarks filter_memory    500, 2,000 and 8,000 clips of 11 s, each stage in a process of its own, and the filter
                                        then again with one more; writes results/filter-memory.json

Signatures and traces are drawn by chance, one clip in 50 is a copy of another, and captions have 600 letters. Prepared measures lie in the
clips' cache, so that the stage does all but reading videos.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.common.machine import describe_machine, write_result
from cf_model.data.latent_writer import summarize_entries, write_latents
from cf_model.data.measures import SECOND_LOOKS, SIGNATURE_RATE, FileMeasures, dump_measures
from cf_model.data.video_reader import VideoFacts
from tasks import clips as copying
from tasks import encode as encoding
from tasks import filter as filtering
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import dump_json_lines
from tasks.params.load import load_params
from tasks.parts.clip_cache import ClipCache

SIZES = (500, 2000, 8000)
FRAMES, FPS = 177, 16.0
COPIED = 50  # one clip in so many is a copy of the one 7 before it


def draw_measures(number: int, height: int, width: int) -> FileMeasures:
    """Draw the measures of a clip that passes every rule; its pictures differ from those of other clips, and a little in time."""
    rng = np.random.default_rng(number - 7 if number % COPIED == COPIED - 1 else number)
    pictures, looks = round(FRAMES / FPS * SIGNATURE_RATE) + 1, round(FRAMES / FPS * SECOND_LOOKS)
    look = rng.integers(0, 256, (1, 8, 8, 3))
    signature = np.clip(look + rng.integers(-30, 31, (pictures, 8, 8, 3)), 0, 255).astype(np.uint8)
    change, lasting = (rng.uniform(1, 2, FRAMES).astype(np.float32) for _ in range(2))
    motion, shift = rng.uniform(5, 9, FRAMES).astype(np.float32), np.full((FRAMES, 2), 0.01, np.float32)
    facts = VideoFacts(FRAMES, FPS, width, height, Fraction(FRAMES) / Fraction(FPS))
    return FileMeasures(
        facts, FPS, change, lasting / 2, motion, np.zeros(FRAMES, np.float32), shift, signature,
        sharpness=rng.uniform(8, 9, looks), borders=np.zeros((looks, 4)), text=np.zeros((looks, 16), np.uint8),
    )  # fmt: skip


def prepare_clips(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write stand-ins of clips and their measures in the clips' cache; return the rows of clips.jsonl."""
    video, rows = load_params(ROOT / "profiles/smoke.yaml").video, []
    cache = ClipCache("measures", {"fps": video.fps}, modules=filtering.MODULES, libraries=("av", "numpy"))
    words = ("river", "bridge", "camera", "slowly", "evening", "window", "person", "street")
    for number in range(count):
        file, rng = folder / f"clip-{number:05d}.mp4", np.random.default_rng(number)
        file.write_text(file.name)
        cache.put(compute_dvc_md5(file), dump_measures(draw_measures(number, video.height, video.width)))
        caption = " ".join(words[k] for k in rng.integers(0, len(words), 90))
        rows.append({"id": file.stem, "file": file.name, "caption": caption[:600], "source": f"films/{file.name}"})
    return rows


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    """Run a stage in this process; return its peak of memory, its memory before, its CPU seconds and what it found."""
    params = load_params(ROOT / "profiles/smoke.yaml")
    before, spent = read_resident_mib("VmRSS"), time.process_time()
    track: Any = SimpleNamespace(facts={}, progress=lambda *_, **__: SimpleNamespace(update=lambda: None))  # a mock would remember calls
    if stage == "clips":
        source = params.clips.model_copy(update={"source": "folder", "folder": folder / "raw"})
        metrics = copying.run(params.model_copy(update={"clips": source}), track, out=folder / "copied")
    elif stage == "filter":
        metrics = filtering.run(params, track, clips=folder / "clips", out=folder / "manifest.jsonl")
    else:
        metrics = write_tiny_latents(folder)
    found = {"stage": stage, "clips": metrics["clips"], "accepted": metrics.get("kept"), "copies": metrics.get("rejected_duplicate")}
    found |= {"compared_with_all": track.facts.get("compared_with_all"), "before_mib": before, "peak_mib": read_resident_mib("VmHWM")}
    return found | {"cpu_seconds": round(time.process_time() - spent, 1)}


def write_tiny_latents(folder: Path) -> dict[str, float]:
    """Do all that encode does with the manifest, but for the codec and the text encoder."""
    latents, about = torch.zeros(3, 4, 1, 1), {"md5": "0" * 32, "count": 12, "sum": 0.0, "square": 0.0, "by_decord": False}
    layout: dict[str, Any] = {"shard_mib": 0.1, "dtype": torch.float32, "fps": FPS, "negative": ""}
    rows = encoding.AcceptedClips(folder / "manifest.jsonl")
    entries = write_latents(folder / "latents", rows, lambda clip: (latents, about), lambda texts: torch.ones(len(texts), 4, 4), **layout)
    return summarize_entries(entries)


def read_resident_mib(name: str) -> float:
    """Read a line of this process's memory, such as its peak (VmHWM), in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(lines[name].split()[0]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks filter_memory", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="CLIPS")
    parser.add_argument("--run", nargs=2, metavar=("STAGE", "FOLDER"), help="run a stage in this process alone")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run_stage(args.run[0], Path(args.run[1]))))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CF_KEPT"] = str(folder / "kept")
        clips = folder / "clips"
        clips.mkdir()
        rows = prepare_clips(clips, max(args.sizes) + 1)
        for size in args.sizes:
            (folder / "raw").mkdir()
            for row in rows[:size]:
                shutil.copy(clips / row["file"], folder / "raw" / row["file"])
            # all clips, of which the filter has compared none; then one more, which comes before all of them
            for stage, shown in (("clips", rows[:0]), ("filter", rows[1 : size + 1]), ("filter", rows[: size + 1]), ("encode", rows[:0])):
                (clips / "clips.jsonl").write_text(dump_json_lines(shown))
                done = subprocess.run([sys.executable, __file__, "--run", stage, name], stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout))
                print(found[-1], flush=True)
            for place in ("kept/duplicates", "raw", "copied", "latents"):
                shutil.rmtree(folder / place)
    result: dict[str, Any] = {"machine": describe_machine(), "frames": FRAMES, "rows": found, "kib_per_clip": {}}
    for stage in ("clips", "filter", "encode"):
        peaks = [row for row in found if row["stage"] == stage]
        *_, small, large = peaks[::2] if stage == "filter" else peaks
        grown = (large["peak_mib"] - small["peak_mib"]) * 1024 / max(1, large["clips"] - small["clips"])
        result["kib_per_clip"][stage] = round(grown, 2)
    write_result("filter-memory", result)


if __name__ == "__main__":
    main()
