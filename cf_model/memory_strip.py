"""The memory strip: which latent frames are in sink, slow and fast while a chunk is made, and when a frame was promoted.

Three forms of the same rows: a trace (jsonl) for programs, a timeline (PNG) for people, and a strip under every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .model.memory import MemorySpec
from .pipeline import Chunk

Row = dict[str, Any]  # of the trace, a chunk each

# Choice: Tol's bright colours, which colour-blind readers can tell apart too
COLOURS = {"sink": "#4477aa", "slow": "#ee6677", "fast": "#228833", "now": "#bbbbbb"}
LABELS = {"sink": "sink", "slow": "slow (promoted)", "fast": "fast", "now": "being made"}
CELL, LINE, MARGIN = 30, 16, 8  # pixels of the strip: a place of the memory, a line of text, the border
PANEL_SECONDS = 60.0  # seconds of video that one panel shows well
BACKGROUND, TEXT, FRESH = "#101010", "#f0f0f0", "#ffffff"


def build_row(chunk: Chunk, number: int, second: float) -> Row:
    """Return a chunk's row of the trace; `second` is when the chunk begins in the video file."""
    return {
        "chunk": number,
        "second": round(second, 4),
        **chunk.context,
        "now": list(range(chunk.first, chunk.first + chunk.latents)),
        "promoted": list(chunk.promoted),
        "similarity": None if chunk.similarity is None else float(f"{chunk.similarity:.6g}"),
        "prompt": chunk.prompt,
        "real": chunk.real,
    }


def show_memory(
    chunks: Iterable[Chunk], note: Callable[[Row], object], *, fps: int, seconds: float, burned: MemorySpec | None
) -> Iterator[np.ndarray]:
    """Yield the frames of a video of so many seconds, and hand each chunk's row to `note` before its first frame.

    `burned`: the memory whose strip stands below every frame; None: frames as they are.
    """
    frames_before = 0
    for number, chunk in enumerate(chunks):
        row = build_row(chunk, number, frames_before / fps)
        frames_before += len(chunk.frames)
        note(row)
        yield from burn_strip(chunk.frames, row, burned, seconds) if burned else chunk.frames


def burn_strip(frames: np.ndarray, row: Row, spec: MemorySpec, seconds: float) -> np.ndarray:
    """Return a chunk's frames [F, H, W, 3] with the strip below; small ones are enlarged by a whole number, to make it legible."""
    places = {"sink": spec.sink, "slow": spec.slow, "fast": max(spec.fast - len(row["now"]), 0), "now": len(row["now"])}
    places = {part: max(count, len(row[part])) for part, count in places.items()}
    wanted = 2 * MARGIN + CELL * sum(places.values()) + MARGIN * (len(places) - 1)
    factor = -(-wanted // frames.shape[2])
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    strip = np.asarray(draw_strip(row, places, large.shape[2], seconds))
    return np.concatenate([large, np.broadcast_to(strip, (len(large), *strip.shape))], axis=1)


def draw_strip(row: Row, places: Mapping[str, int], width: int, seconds: float) -> Image.Image:
    """Draw the places of the memory with the latent frames in them, and below where those frames lie in the video."""
    image = Image.new("RGB", (width, 2 * MARGIN + 5 * LINE), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    x, top = MARGIN, MARGIN + LINE
    for part, count in places.items():
        if count:
            draw.text((x, MARGIN), part, COLOURS[part], font)
        for place in range(count):
            frame = row[part][place] if place < len(row[part]) else None
            box = (x, top, x + CELL - 3, top + LINE + 4)
            fresh = part == "slow" and frame in row["promoted"]
            draw.rectangle(box, COLOURS[part] if frame is not None else None, FRESH if fresh else COLOURS[part], 2 if fresh else 1)
            if frame is not None:
                draw.text((x + CELL / 2 - 1, top + LINE / 2 + 2), str(frame), "#000000" if part == "now" else TEXT, font, "mm")
            x += CELL
        x += MARGIN if count else 0
    left, right, y = MARGIN, width - MARGIN, top + 2 * LINE
    per = (row["now"][0] * 4 - 3) / row["second"] if row["second"] else 16  # frames a second
    draw.line((left, y + 5, right, y + 5), "#606060")
    for part in places:
        for frame in row[part]:
            at = left + (right - left) * min(1.0, max(0, 4 * frame - 3) / per / seconds)
            tall = 5 if part == "slow" and frame in row["promoted"] else 0
            draw.rectangle((at - 1, y - tall, at + 1, y + 10), COLOURS[part])
    caption = f"{row['second']:6.2f} of {seconds:.2f} s   latent frames {row['now'][0]}-{row['now'][-1]}"
    caption += f"   promoted: {', '.join(map(str, row['promoted']))}" if row["promoted"] else ""
    draw.text((left, y + LINE), caption + ("   (the clip)" if row["real"] else ""), TEXT, font)
    return image


def draw_timeline(rows: Sequence[Row], path: Path, seconds: float) -> None:
    """Write a PNG: time runs to the right, latent frames upwards; a line is how long a frame was held, a triangle its promotion.

    A long video gets a second panel with its end, because its lines lie too close to be told apart.
    """
    from matplotlib.figure import Figure

    long = seconds > PANEL_SECONDS
    figure = Figure(figsize=(11, 9 if long else 6), layout="constrained")
    panels = figure.subplots(2 if long else 1, squeeze=False)
    promoted = sum(len(row["promoted"]) for row in rows)
    title = f"What the model held of the past: {len(rows)} chunks, {promoted} promotions"
    draw_panel(panels[0, 0], rows, seconds, 0.0, title)
    if long:
        sink = f"; sink, held throughout: {', '.join(map(str, rows[-1]['sink'])) or 'none'}"
        draw_panel(panels[1, 0], rows, seconds, seconds - PANEL_SECONDS, f"the last {PANEL_SECONDS:g} s{sink}")
    figure.legend(*panels[-1, 0].get_legend_handles_labels(), loc="outside upper right", ncols=6, fontsize=9, frameon=False)
    figure.savefig(path, format="png", dpi=130)


def draw_panel(axes: Any, rows: Sequence[Row], seconds: float, begin: float, title: str) -> None:
    """Draw the timeline from second `begin` on; after second 0 without the sink, which would lie far below."""
    from matplotlib.collections import LineCollection

    ends = [*(row["second"] for row in rows[1:]), seconds]
    frames = [frame for row, end in zip(rows, ends, strict=True) if end > begin for part in COLOURS for frame in row[part]]
    frames = [frame for frame in frames if not begin or frame not in rows[-1]["sink"]]
    low, high = min(frames), max(frames)
    thick = max(1.2, min(8.0, 0.9 * 330 / (high - low + 1)))  # points; the axes are about 330 high
    for part in COLOURS:
        spans = [((start, frame), (end, frame)) for (frame, start), end in find_spans(rows, ends, part).items()]
        axes.add_collection(LineCollection(spans, colors=COLOURS[part], linewidths=thick, label=LABELS[part], capstyle="butt"))
    marks = [(row["second"], frame) for row in rows for frame in row["promoted"]]
    if marks:
        size = 14 if high - low < 400 else 3
        axes.scatter(*zip(*marks, strict=True), s=size, marker="^", color="black", label="promotion", zorder=3, linewidths=0)
    for before, after in pairwise(rows):
        if after["prompt"] != before["prompt"] and after["second"] > begin:
            axes.axvline(after["second"], color="black", linewidth=0.8, linestyle=":")
            place = {"xy": (after["second"], 0.985), "xytext": (-2, 0), "textcoords": "offset points"}
            axes.annotate(after["prompt"][:48], **place, xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8, rotation=90)
    if rows[0]["real"]:
        axes.axvspan(0, next(row["second"] for row in rows if not row["real"]), color="#eeeeee", zorder=0, label="the clip")
    margin = 0.02 * (high - low) + 0.5
    axes.set(xlim=(begin, seconds), ylim=(low - margin, high + margin))
    axes.set(xlabel="seconds of video", ylabel="latent frame (4 video frames each)")
    axes.set_title(title, loc="left", fontsize=11)


def find_spans(rows: Sequence[Row], ends: list[float], part: str) -> dict[tuple[int, float], float]:
    """Return (latent frame, second from which it was held) -> second until which it was held, for a part of the memory."""
    spans: dict[tuple[int, float], float] = {}
    since: dict[int, float] = {}
    for row, end in zip(rows, ends, strict=True):
        second: float = row["second"]
        since = {frame: since.get(frame, second) for frame in row[part]}
        spans |= {(frame, start): end for frame, start in since.items()}
    return spans
