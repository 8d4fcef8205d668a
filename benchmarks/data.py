"""CPU time of what happens to a clip before training: rendered, written, read, measured by the filter, encoded, and read for a step.

  python -m benchmarks data            a minute of one core; writes results/data.json

Clips are worlds of profile tiny, 30 s of 32 x 32 at 16 frames a second; the latents' windows are those of stage base.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common.interleave import interleave, summarize
from benchmarks.common.machine import describe_machine, write_result
from cf_model.codec.linear import LinearCodec
from cf_model.data import worlds
from cf_model.data.latents import Latents, write_latents
from cf_model.data.measures import measure_file
from cf_model.data.video import write_video
from cf_model.data.video_reader import read_video
from tasks.params.load import load_params

ROUNDS = 7


def main() -> None:
    torch.set_num_threads(1)
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
