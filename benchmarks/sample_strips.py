"""Frames of the first three held-out prompts of a finished run, system by system: docs/tiny.png.

python -m benchmarks sample_strips [--project . --out docs/tiny.png]     seconds, after `make repro`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
from PIL import Image, ImageDraw

SECONDS = (0, 1, 2.5, 5, 7.5, 10, 15, 20, 25, 29)
SYSTEMS = ("base", "causal_init", "stage1", "stage2", "real")
PROMPTS, SIZE, GAP, LEFT, LINE = 3, 72, 3, 110, 22


def read_frames(file: Path, seconds: tuple[float, ...]) -> list[Image.Image]:
    """The frame shown at each time, as far as the video goes."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_image() for frame in container.decode(stream)]
        rate = float(stream.average_rate or 16)
    return [frames[round(second * rate)] for second in seconds if round(second * rate) < len(frames)]


def draw_strips(samples: Path) -> Image.Image:
    rows = [row for row in map(json.loads, (samples / "index.jsonl").read_text().splitlines()) if row["suite"] == "prompts"]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:PROMPTS]
    height = LINE + PROMPTS * (LINE + len(SYSTEMS) * (SIZE + GAP))
    sheet = Image.new("RGB", (LEFT + len(SECONDS) * (SIZE + GAP), height), "white")
    pen, y = ImageDraw.Draw(sheet), LINE
    for place, second in enumerate(SECONDS):
        pen.text((LEFT + place * (SIZE + GAP) + 4, 5), f"{second:g} s", fill="gray")
    for prompt in prompts:
        pen.text((4, y + 5), f'"{prompt}"', fill="black")
        y += LINE
        for system in SYSTEMS:
            file = next(row["file"] for row in rows if row["prompt"] == prompt and row["system"] == system)
            pen.text((4, y + SIZE // 2 - 5), system, fill="black")
            for place, frame in enumerate(read_frames(samples / file, SECONDS)):
                sheet.paste(frame.resize((SIZE, SIZE), Image.Resampling.BILINEAR), (LEFT + place * (SIZE + GAP), y))
            y += SIZE + GAP
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path("."), help="a checkout whose samples/ are there; default: .")
    parser.add_argument("--out", type=Path, default=Path("docs/tiny.png"))
    given = parser.parse_args()
    draw_strips(given.project / "samples").save(given.out, optimize=True)


if __name__ == "__main__":
    main()
