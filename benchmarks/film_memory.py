"""Memory that a long film of 3840 x 2160 takes to be measured by the filter and read for encoding: a tenth of a minute beside a minute.

python -m benchmarks film_memory       five minutes of one core; writes results/film_memory.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import av
import numpy as np

from benchmarks.common.machine import describe_machine, write_result
from cf_model.data.measures import measure_file
from cf_model.data.subprocess_reader import read_in_subprocess
from cf_model.data.video_reader import probe_video, read_pieces

HEIGHT, WIDTH, FPS = 2160, 3840, 16
SECONDS = (6, 60)
MODEL = {"height": 480, "width": 832, "fps": 16}
PIECE = 64  # frames, as the stage encode reads them


def write_film(path: Path, frames: int) -> None:
    """Write a film in which a bright bar moves over a textured picture."""
    texture = np.random.default_rng(0).integers(60, 180, (HEIGHT // 8, WIDTH // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(FPS), options={"preset": "ultrafast", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        chroma = np.full((HEIGHT // 2, WIDTH), 128, np.uint8)
        for number in range(frames):
            luma = texture.copy()
            at = number * 16 % (WIDTH - 400)
            luma[:, at : at + 400] = 230
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]), format="yuv420p")))
        file.mux(stream.encode(None))


def measure_peak(path: Path, *, way: str) -> tuple[float, float, int]:
    """Run one way of reading; return this process's peak in MiB, its CPU time in seconds, and the frames that it saw."""
    began = time.process_time()
    ways: dict[str, Callable[[], int]] = {
        "start": lambda: 0,
        "decode": lambda: probe_video(path).frames,
        "measure (filter)": lambda: measure_file(path, fps=FPS).frames,
        "read for encoding": lambda: sum(len(piece) for piece in read_pieces(path, **MODEL, size=PIECE)),
    }
    frames = ways[way]()
    # not ru_maxrss, in which a new process inherits its parent's peak
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024, time.process_time() - began, frames


def main() -> None:
    from benchmarks.film_memory import measure_peak as task  # by a name that a child can import

    result: dict[str, Any] = {"machine": describe_machine(), "size": [HEIGHT, WIDTH], "fps": FPS, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in SECONDS:
            path = Path(folder) / f"{seconds}.mp4"
            write_film(path, seconds * FPS)
            for way in ("start", "decode", "measure (filter)", "read for encoding"):
                [(_, (peak, spent, frames))] = read_in_subprocess(partial(task, way=way), [path], workers=1, timeout=3600.0)
                row = {"way": way, "seconds": seconds, "frames": frames, "peak_mib": round(peak), "cpu_seconds": round(spent, 2)}
                result["rows"].append(row)
                print(row, flush=True)
    write_result("film_memory", result)


if __name__ == "__main__":
    main()
