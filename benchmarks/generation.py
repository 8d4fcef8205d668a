"""Memory and speed of generation against the length of the video: memory is flat, and promotions go on to the end.

  python benchmarks/generation.py            one process per length; writes results/generation.{json,png}

Sizes, memory and levels are those of profile tiny; the weights are random, which changes neither time nor memory. Each
process makes one video as `cf generate --model` does, into an mp4 that grows, and samples its resident memory on the way.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
LENGTHS = (5, 60, 600)  # seconds
EVERY = 5  # chunks between two samples


def model() -> Any:
    import torch

    from cf_model.codec.linear import LinearCodec
    from cf_model.folder import Recipe
    from cf_model.model import wan
    from cf_model.pipeline import ContextForcingPipeline
    from cf_model.text.encoder import WordEncoder
    from tasks.params import load

    torch.set_num_threads(1)
    p = load.load_params(HERE.parent / "profiles/tiny.yaml")
    rng = torch.Generator().manual_seed(0)
    denoiser = wan.build_transformer(p.model, channels=p.codec.linear.channels, text_channels=p.text.channels, seed=0)
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.1, generator=rng)
    codec = LinearCodec(p.codec.linear.channels, p.codec.linear.width).eval()
    codec.decoder.normal_(0, 0.02, generator=rng)
    rollout, size = p.stage2.rollout, p.video
    recipe = Recipe(p.stage2.memory, rollout.chunk, rollout.levels, p.flow, size.fps, size.height, size.width, "Random weights.", "none")
    return ContextForcingPipeline(denoiser, codec, WordEncoder(p.text.tokens, p.text.channels), recipe)


def measure(seconds: float, out: Path) -> dict[str, Any]:
    from cf_model.data.video import grow_video

    pipe, start, began, cpu = model(), resident(), time.perf_counter(), time.process_time()
    samples: list[tuple[float, float, int]] = []  # seconds of video, MiB, promotions
    shown, promoted, full, first, chunks = 0, [], None, None, 0

    def frames() -> Iterator[Any]:
        nonlocal shown, full, first, chunks
        for number, chunk in enumerate(pipe.chunks("a red disc over hills", seconds=seconds)):
            first = first or (time.perf_counter() - began, time.process_time() - cpu)
            promoted.extend([round(shown / pipe.recipe.fps, 2)] * len(chunk.promoted))
            if full is None and len(chunk.context["slow"]) == pipe.recipe.memory.slow:
                full = round(shown / pipe.recipe.fps, 2)
            chunks = number + 1
            yield from chunk.frames
            shown += len(chunk.frames)
            if number % EVERY == EVERY - 1:
                samples.append((round(shown / pipe.recipe.fps, 2), round(resident(), 1), len(promoted)))

    count = grow_video(out, frames(), fps=pipe.recipe.fps, crf=16)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    assert count == seconds * pipe.recipe.fps and first
    return {
        "seconds": seconds,
        "start_mib": round(start, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "first_frame_seconds": round(first[0], 3),
        "first_frame_cpu_seconds": round(first[1], 3),
        "cpu_ms_a_chunk": round(1000 * (spent - first[1]) / max(1, chunks - 1), 1),
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(spent, 2),
        "video_seconds_per_cpu_second": round(seconds / spent, 3),
        "video_seconds_per_second": round(seconds / wall, 3),
        "promotions": len(promoted),
        "promotions_in_the_last_minute": sum(at >= seconds - 60 for at in promoted),
        "slow_memory_full_at": full,
        "samples": samples,
    }


def resident() -> float:
    """MiB, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(float(sys.argv[1]), Path(folder) / "video.mp4")))
        return
    from training_memory import machine  # the benchmark beside this one

    # what `cf` itself sets
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env |= {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
    rows = []
    for seconds in LENGTHS:
        done = subprocess.run([sys.executable, __file__, str(seconds)], env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({name: value for name, value in rows[-1].items() if name != "samples"}, flush=True)
    assert rows[-1]["slow_memory_full_at"] < 60 and rows[-1]["promotions_in_the_last_minute"] > 0
    out = HERE / "results"
    text = json.dumps({"machine": machine(), "profile": "tiny", "weights": "random", "rows": rows})
    (out / "generation.json").write_text(text.replace('{"seconds"', '\n {"seconds"').replace("]]}]}", "]]}\n]}") + "\n")
    plot(rows, out / "generation.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, figsize=(7, 4.6), sharex=True, layout="constrained")
    for row in reversed(rows):  # the shortest on top
        at, mib, _ = zip(*row["samples"], strict=True)
        said = f"{row['seconds']:g} s of video: peak {row['peak_mib']:.0f} MiB, {row['video_seconds_per_second']:.0f} s of video a second"
        upper.plot(at, mib, marker="o" if len(at) < 3 else None, label=said)
    top = 1.3 * max(row["peak_mib"] for row in rows)
    upper.set(ylabel="resident memory, MiB", ylim=(0, top), title="Generation, profile tiny, one CPU thread")
    upper.axhline(rows[0]["start_mib"], color="grey", linestyle=":", label=f"before the first chunk: {rows[0]['start_mib']:.0f} MiB")
    upper.legend(frameon=False, fontsize=8, loc="lower right")
    at, _, count = zip(*rows[-1]["samples"], strict=True)
    lower.plot(at, count, color="black")
    lower.set(xlabel="seconds of video made so far", ylabel="promotions so far", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
