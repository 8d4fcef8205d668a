"""CPU time of the evaluation of one video of 15.6 s at profile tiny, metric by metric.

python -m benchmarks evaluation            a minute of one core; writes results/evaluation.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.common.interleave import interleave, summarize
from benchmarks.common.machine import describe_machine, write_result
from cf_model.codec.interface import TIME, video_frames
from cf_model.data import worlds
from cf_model.evaluate import oracle
from cf_model.evaluate.stutter import measure_stutter
from tasks.params.load import load_params

ROUNDS, LATENTS, PREFIX = 7, 63, 81  # frames of a real prefix


def main() -> None:
    torch.set_num_threads(1)
    params = load_params(ROOT / "profiles/tiny.yaml")
    fps, frames, world = params.video.fps, video_frames(LATENTS), worlds.draw_world(1)
    video = worlds.render_clip(world, frames, height=params.video.height, width=params.video.width, fps=fps)
    truth, kept = world.truth(frames, fps), oracle.find_bins_in_view(video[: video_frames(params.evaluate.sink)])
    rules: dict[str, Any] = {"gap": params.evaluate.gap, "absence": params.evaluate.absence}
    ways = {
        "what a frame shows (prompt_metrics)": lambda: oracle.prompt_metrics(video, truth, fps),
        "what comes back (memory_metrics)": lambda: oracle.memory_metrics(video, fps, params.evaluate.absence, kept=kept),
        "the map after a prefix (map_metrics)": lambda: oracle.map_metrics(video, truth, prefix=PREFIX, fps=fps, kept=kept, **rules),
        "the map of the world (build_map)": lambda: oracle.build_map(video),
        "headings": lambda: oracle.read_heading(video),
        "stutter": lambda: measure_stutter(video, period=TIME, first=0),
    }
    spent = interleave(ways, rounds=ROUNDS)
    result = {"machine": describe_machine(), "profile": "tiny", "unit": f"milliseconds of CPU time a video of {frames} frames"}
    result["rows"] = [{"what": name} | summarize(values) for name, values in spent.items()]
    for row in result["rows"]:
        print(row)
    write_result("evaluation", result)


if __name__ == "__main__":
    main()
