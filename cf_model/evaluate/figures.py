"""The report's videos, frame strips and curves, each as text that goes into the page.

Videos are chosen by rule (cases.py), as many as fit, so that none is picked by hand.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

from cf_model.codec.interface import TIME
from cf_model.evaluate import oracle
from cf_model.evaluate.statistics import Interval

Row = Mapping[str, Any]  # of samples/index.jsonl

PALETTE = ("#3f83c9", "#e0813a", "#37a06c", "#c9527f", "#8d72d6", "#b8922e", "#3fa5b5", "#a5694f", "#6f9a35", "#d0655c")
GREY = "#8a8f98"
GALLERY_ROWS = {"prompts": 8, "continuations": 4}  # rows of a gallery, the first in the order of the index
GUESS_VIDEOS = 8  # videos in the blind guess, those after the gallery's
STRIP_ROWS = 4  # gallery rows that have frame strips
STRIP_SECONDS = 2.5  # seconds between the frames of a strip
MEMORY_WORLDS = 3  # continued worlds in the picture that the page begins with
STRIP_HEIGHT = 48  # pixels of a strip's frames in the file; the page shows them larger
BYTE_BUDGET = {"prompts": 4_000_000, "guess": 900_000, "continuations": 1_600_000}  # bytes of mp4: keeps the page below 12 MB


class Line(NamedTuple):
    """A curve of a chart, with the ends of its intervals if it has any."""

    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False


class Point(NamedTuple):
    """A system in a plane, with the intervals of both its coordinates."""

    colour: str
    name: str
    x: Interval
    y: Interval


class Mark(NamedTuple):
    """A vertical line of a chart with a few words beside it."""

    at: float
    words: str


INK = "#010203"  # becomes currentColor, so that a figure follows the page's theme


@contextmanager
def open_axes(size: tuple[float, float]) -> Iterator[tuple[Any, io.StringIO]]:
    """Yield axes in the page's style, and a file that holds the figure as SVG afterwards."""
    style: Any = {"svg.hashsalt": "context-forcing", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK)
    with matplotlib.rc_context(style):
        figure, file = Figure(figsize=size, layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, linewidth=0.6)
        yield axes, file
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def draw_chart(lines: Sequence[Line], *, x: str, log: bool = False, marks: Sequence[Mark] = ()) -> str:
    """Draw curves as a small inline SVG; `x` labels the axis."""
    with open_axes((3.5, 1.9)) as (axes, file):
        for line in lines:
            axes.plot(line.x, line.y, color=line.colour, linewidth=0.7 if line.faint else 1.6, alpha=0.35 if line.faint else 1)
            if len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.15, linewidth=0)
        for mark in marks:
            axes.axvline(mark.at, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(mark.words, (mark.at, 1), (2, -1), **place, fontsize=7, va="top", alpha=0.75)
        axes.set_xlabel(x)
        if log:
            axes.set_yscale("log")
    return clean_svg(file.getvalue())


def draw_points(points: Sequence[Point], *, x: str, y: str) -> str:
    """Draw systems as points with their names and, where there are any, the intervals of both coordinates, as an inline SVG."""
    with open_axes((4.6, 3.2)) as (axes, file):
        for colour, name, across, up in points:
            both = {"xerr": across, "yerr": up}
            bars = {axis: [[max(0, i.mean - i.low)], [max(0, i.high - i.mean)]] for axis, i in both.items() if i.has_ends}
            axes.errorbar(across.mean, up.mean, fmt="o", color=colour, elinewidth=1, markersize=6, alpha=0.9, **bars)
            axes.annotate(name, (across.mean, up.mean), (6, 4), textcoords="offset points", fontsize=8)
        axes.margins(0.12)
        axes.set(xlabel=x, ylabel=y)
    return clean_svg(file.getvalue())


def draw_differences(each: Sequence[float]) -> str:
    """Draw a bar for each difference, up or down from a line at 0; the largest fills the picture. As SVG."""
    reach = max((abs(change) for change in each), default=0) or 1.0
    heights = [10 * change / reach for change in each]  # of the 20 units that the picture is high
    bars = "".join(f'<rect x="{k}.1" y="{min(0, -h):.2f}" width=".8" height="{abs(h):.2f}"/>' for k, h in enumerate(heights))
    shape = f'viewBox="0 -10 {len(each)} 20" preserveAspectRatio="none" width="130" height="30"'
    line = f'<path d="M0 0H{len(each)}" stroke="currentColor" stroke-width=".3"/>'
    return f'<svg {shape} role="img" aria-label="{len(each)} differences in ascending order" fill="{PALETTE[0]}">{bars}{line}</svg>'


def clean_svg(svg: str) -> str:
    """Return matplotlib's SVG as a fragment for a page: without its head, in the page's colour, with no id that nothing refers to."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)  # several figures share the page
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', svg)


def average_rows(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the steps that have a number under `name`, the numbers, and their running mean over a twentieth of the rows.

    The mean ends at the last step and begins later than the first. None for fewer than two numbers.
    """
    pairs = np.array([(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)], float)
    if len(pairs) < 2:
        return None
    width = max(1, len(pairs) // 20)
    return pairs[:, 0], pairs[:, 1], np.convolve(pairs[:, 1], np.ones(width) / width, "valid")


def wants_logarithm(values: np.ndarray) -> bool:
    """Return whether a chart of the values needs a logarithmic axis: all are above zero, and the largest is 50 times the smallest."""
    return bool((values > 0).all() and values.max() > 50 * values.min())


def draw_strip(frames: UInt8[np.ndarray, "V Y X 3"], height: int) -> str:
    """Put frames side by side in a PNG (a data address), each brought to `height` by bicubic interpolation."""
    width = round(frames.shape[2] * height / frames.shape[1])
    large = [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(large, axis=1)).save(file, "png", optimize=True)
    return data_address("image/png", file.getvalue())


def data_address(kind: str, content: bytes) -> str:
    """Return bytes of a media type as a data: address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def prompt_number(row: Row) -> str:
    """Return the number in a video's file name, or the clip of a real video."""
    match = re.fullmatch(r"(.+)-s\d+", Path(row["file"]).stem)
    return match[1] if match else str(row["clip"])


def item_key(row: Row) -> str:
    """Return the key that videos of different systems share: number and prompt, because two clips may share a caption."""
    return f"{prompt_number(row)} {row['prompt']}"


def group_by_item(index: Iterable[Row], suite: str) -> dict[str, dict[str, Row]]:
    """Group a suite's videos: item -> system -> video of the item's first seed, in the order of the index.

    An item with a real clip and no system is left out.
    """
    items: dict[str, dict[str, Row]] = {}
    for row in index:
        if row["suite"] == suite:
            items.setdefault(item_key(row), {}).setdefault(row["system"], row)
    return {key: videos for key, videos in items.items() if set(videos) != {"real"}}


def fit_budget(items: Mapping[str, Mapping[str, Row]], most: int, budget: int, samples: Path) -> list[str]:
    """Choose the first items, at most `most` and as many as fit into `budget` bytes: the rule that the page states."""
    chosen: list[str] = []
    for key in list(items)[:most]:
        budget -= sum(path.stat().st_size for row in items[key].values() if (path := samples / row["file"]).exists())
        if budget < 0:
            break
        chosen.append(key)
    return chosen


def embed_video(path: Path) -> str | None:
    """Return a video as a data address; None if the file is absent."""
    return data_address("video/mp4", path.read_bytes()) if path.exists() else None


def video_seconds(path: Path) -> float | None:
    """Return a video's length in seconds; None if the file is absent."""
    if not path.exists():
        return None
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return float(stream.duration * stream.time_base)


def read_frames(path: Path, step: int = 1) -> np.ndarray | None:
    """Read every `step`-th frame, [V, Y, X, 3]; None if the file is absent or empty."""
    if not path.exists():
        return None
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for k, frame in enumerate(file.decode(video=0)) if k % step == 0]
    return np.stack(frames) if frames else None


def build_gallery(
    suite: str, index: Sequence[Row], systems: Sequence[str], samples: Path, fps: int, cases: Mapping[str, str]
) -> dict[str, Any]:
    """Build a suite's gallery: videos of all systems for the same prompt and seed, and strips of the first rows.

    `cases`: the items to show in their order, and why each is shown.
    """
    real = {row["clip"]: row for row in index if row["system"] == "real" and row["clip"] is not None}
    items = group_by_item(index, suite)
    for key, videos in items.items():  # a real clip is written once, and belongs to every item that has its prompt
        clip = next(iter(videos.values()))["clip"]
        items[key] = {"real": real[clip]} | videos if clip in real else videos
    systems = [*(name for name in systems if name != "real"), "real"]
    chosen = fit_budget({key: items[key] for key in cases}, GALLERY_ROWS[suite], BYTE_BUDGET[suite], samples)
    present = {name for videos in items.values() for name in videos}  # real clips need not have been written as samples
    rows = []
    for place, key in enumerate(chosen):
        videos = items[key]
        first = next(row for name, row in videos.items() if name != "real")
        tiles: list[dict[str, Any]] = []
        strips: list[dict[str, Any]] = []
        for name in [name for name in systems if name in videos]:
            row = videos[name]
            file = samples / row["file"]
            about = {"file": row["file"], "held": read_held(file.with_suffix(".json"), fps)}
            tiles.append({"system": name, "source": embed_video(file), "seconds": video_seconds(file)} | about)
            if place < STRIP_ROWS and (frames := read_frames(samples / row["file"], round(STRIP_SECONDS * fps))) is not None:
                strips.append({"system": name, "source": draw_strip(frames, STRIP_HEIGHT), "frames": len(frames)})
        absent = [name for name in systems if name not in videos and (name in present or name != "real")]
        times = [STRIP_SECONDS * k for k in range(max((s["frames"] for s in strips), default=0))]
        prefix = max(row["prefix_frames"] for row in videos.values()) / fps
        about = {"number": prompt_number(first), "prompt": first["prompt"], "seed": first["seed"], "prefix": prefix, "times": times}
        rows.append(about | {"id": f"{suite}-{place}", "why": cases[key], "key": key, "tiles": tiles, "strips": strips, "absent": absent})
    return {"rows": rows, "of": len(items), "most": GALLERY_ROWS[suite], "real": "real" in present}


def read_held(path: Path, fps: int) -> str | None:
    """Read what a video's memory held in each chunk, as JSON for the page: first second, then latent frames in sink, slow, fast and now.

    None where the stage generate wrote no such file, because the system has no memory.
    """
    if not path.exists():
        return None
    chunks = json.loads(path.read_text())
    rows = [[begin_second(c["now"][0], fps), c["sink"], c["slow"], c["fast"], c["now"]] for c in chunks]
    return json.dumps(rows, separators=(",", ":"))


def begin_second(latent: int, fps: float) -> float:
    """Return the second of the video at which a latent frame's frames begin; the first latent is one frame, every other four."""
    return round(max(0, TIME * latent - TIME + 1) / fps, 3)


def draw_memories(index: Sequence[Row], systems: Mapping[str, str], truths: Mapping[str, Any], samples: Path) -> list[dict[str, Any]]:
    """Draw what the first continued worlds look like all around, as each system shows them after the real prefix.

    `systems`: a row's title -> system; `truths`: clip -> its world's facts. Every picture is a circle unrolled, so that a camera that
    goes another way shows the same world. Rows: the truth, what the prefix showed, then the systems.
    """
    drawn: list[dict[str, Any]] = []
    for key, videos in group_by_item(index, "continuations").items():
        rows = {title: videos[system] for title, system in systems.items() if system in videos}
        truth = truths.get(next(iter(videos.values()))["clip"])
        if len(drawn) == MEMORY_WORLDS or not truth or len(rows) < len(systems):
            continue
        read = {title: video for title, row in rows.items() if (video := read_frames(samples / row["file"])) is not None}
        if len(read) < len(rows):
            continue
        prefix = next(iter(rows.values()))["prefix_frames"]
        some = next(iter(read.values()))
        strips = [("the world", oracle.paint_truth(truth, some.shape[1] // 32)), ("seen before", oracle.unroll_panorama(some[:prefix]))]
        strips += [(title, oracle.unroll_panorama(video[prefix:])) for title, video in read.items()]
        about = {"prompt": next(iter(videos.values()))["prompt"], "number": key.split()[0]}
        drawn.append(about | {"rows": [{"title": title, "source": draw_strip(strip[None], STRIP_HEIGHT)} for title, strip in strips]})
    return drawn


def build_guesses(
    index: Sequence[Row], student: str | None, samples: Path, *, shown: Sequence[str], choices: int, seed: int
) -> list[dict[str, Any]]:
    """Build the blind guess: first videos of items not `shown`, each with its caption among `choices` captions in random order.

    The wrong captions are drawn from those of the other prompts, whether they differ in a word or in all.
    """
    items = {key: {student: row[student]} for key, row in group_by_item(index, "prompts").items() if student and student in row}
    order = sorted(items, key=lambda key: key in shown)  # a stable sort: the others first
    captions = sorted({row["prompt"] for videos in items.values() for row in videos.values()})
    questions: list[dict[str, Any]] = []
    for key in fit_budget({key: items[key] for key in order}, GUESS_VIDEOS, BYTE_BUDGET["guess"], samples):
        row = next(iter(items[key].values()))
        rng = np.random.default_rng([seed, len(questions)])
        others = [caption for caption in captions if caption != row["prompt"]]
        offered = [row["prompt"], *(others[k] for k in rng.permutation(len(others))[: choices - 1])]
        places = rng.permutation(len(offered)).tolist()
        source = embed_video(samples / row["file"])
        if source and len(offered) > 1:
            questions.append({"source": source, "choices": [offered[k] for k in places], "answer": places.index(0)})
    return questions
