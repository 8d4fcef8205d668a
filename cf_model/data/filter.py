"""Which clips are fit to learn from: a value of each clip for every rule, and a threshold for each value.

The paper keeps clips "longer than 10 s" of "high quality" and publishes no filter (sec. 4), so the rules are ours. What the values are
is in measures.py, and what of a picture and of a length the model will use is computed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from .duplicates import DuplicateIndex, Likeness
from .measures import FileMeasures

# in the order in which rules are tried
REASONS = (
    "unreadable", "too_short", "wrong_fps", "too_small", "cropped", "clipped", "frozen", "jerky", "shaking", "hard_cut", "blurred",
    "border", "text", "caption", "duplicate",
)  # fmt: skip
MOST_TRIMMED = 3  # cuts near an end; a clip with more of them there stutters, and is left for the other rules
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]{2,}")  # a sign of Chinese, Japanese, Korean; or two letters
JUNK = re.compile(  # names that cameras and programs give, addresses, and long runs of hexadecimal digits
    r"(?<!\w)(img|dsc[nf]?|vid|mvi|mov|pxl|gopr|gx\d*|clip|video|movie|untitled|unnamed|output|screen ?recording|https?:\S*|www\S*"
    r"|(?=[a-f]*\d)[0-9a-f]{8,}|mp4|avi|whatsapp)[\d_]*(?!\w)",
    re.IGNORECASE,
)


class NetworkRule(Protocol):
    """A network's threshold: an entry of params.filter.networks."""

    @property
    def name(self) -> str: ...
    @property
    def at_least(self) -> float: ...


class NetworkCode(Protocol):
    """Where a network's code is: params.filter.captioner."""

    @property
    def code(self) -> str: ...


class FilterRules(Protocol):
    """Thresholds of the rules: params.filter."""

    @property
    def min_seconds(self) -> float: ...
    @property
    def min_fps(self) -> float: ...
    @property
    def min_side(self) -> int: ...
    @property
    def min_share(self) -> float: ...
    @property
    def max_clipped(self) -> float: ...
    @property
    def min_motion(self) -> float: ...
    @property
    def max_repeats(self) -> float: ...
    @property
    def max_shake(self) -> float: ...
    @property
    def max_cut(self) -> float: ...
    @property
    def cuts(self) -> str: ...
    @property
    def trim(self) -> float: ...
    @property
    def min_sharpness(self) -> float: ...
    @property
    def max_border(self) -> float: ...
    @property
    def max_text(self) -> float: ...
    @property
    def min_words(self) -> int: ...
    @property
    def min_distance(self) -> float: ...
    @property
    def networks(self) -> Sequence[NetworkRule]: ...
    @property
    def captioner(self) -> NetworkCode | None: ...


@dataclass(frozen=True)
class ModelShape:
    """What the model takes of a clip."""

    height: int
    width: int
    fps: float
    frames: int  # fewest that a stage of training can use
    latent: int  # frames of a latent; a clip's first latent is a single frame

    def count_usable(self, frames: int) -> int:
        """Return how many of a clip's frames are whole latents."""
        return 1 + (frames - 1) // self.latent * self.latent if frames else 0


@dataclass(frozen=True)
class Rejection:
    """Why a clip is not used."""

    reason: str  # one of REASONS, or a network's name
    value: float | None  # the measure; None: the file can't be read, and the rule is the sentence that says why
    rule: str


@dataclass(frozen=True)
class Part:
    """A part of a file between two cuts, in frames at the model's rate."""

    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.first


def split_at_cuts(file: FileMeasures, rules: FilterRules, start: float | None = None, stop: float | None = None) -> list[Part]:
    """Split a file, or its seconds from `start` to `stop`, into the parts that are judged.

    A cut less than rules.trim seconds from an end is trimmed away with what is beyond it. With rules.cuts `reject` the rest is a single
    part, whatever cuts it has; with `split` a part begins at every cut.
    """
    last = file.frames if stop is None else min(math.floor(stop * file.fps), file.frames)
    outer = Part(min(math.ceil((start or 0) * file.fps), last), last)
    cuts = [int(frame) for frame in np.flatnonzero(file.cuts > rules.max_cut) if outer.first < frame < outer.end]
    near = rules.trim * file.fps
    head, tail = [cut for cut in cuts if cut <= outer.first + near], [cut for cut in cuts if cut >= outer.end - near]
    first = max(head) if 0 < len(head) <= MOST_TRIMMED else outer.first
    end = min(tail) if 0 < len(tail) <= MOST_TRIMMED and min(tail) > first else outer.end
    if rules.cuts == "reject":
        return [Part(first, end)]
    edges = [first, *(cut for cut in cuts if first < cut < end), end]
    return [Part(*pair) for pair in pairwise(edges)]


def list_values(file: FileMeasures, part: Part, caption: str, shape: ModelShape) -> dict[str, float]:
    """Return a part's value for every rule but the duplicates', by the rule's reason."""
    values = file.measure_part(part.first, part.end)
    return {
        "too_short": part.length / shape.fps,
        "wrong_fps": file.facts.fps,
        "too_small": min(file.facts.height, file.facts.width),
        "cropped": measure_kept_share(file.facts.height, file.facts.width, shape),
        "clipped": values["clipped"],
        "frozen": values["motion"],
        "jerky": values["repeats"],
        "shaking": values["shake"],
        "hard_cut": values["cut"],
        "blurred": values["sharpness"],
        "border": values["border"],
        "text": values["text"],
        "caption": count_words(caption),
    }


def list_bounds(rules: FilterRules) -> dict[str, tuple[str, str, float]]:
    """Return the name, comparison and threshold of every rule, by its reason."""
    return {
        "too_short": ("seconds", ">", rules.min_seconds),
        "wrong_fps": ("fps", ">=", rules.min_fps),
        "too_small": ("pixels of the shorter side", ">=", rules.min_side),
        "cropped": ("share of the picture that the model's shape keeps", ">=", rules.min_share),
        "clipped": ("clipped", "<=", rules.max_clipped),
        "frozen": ("motion", ">=", rules.min_motion),
        "jerky": ("share of repeated frames", "<=", rules.max_repeats),
        "shaking": ("shake", "<=", rules.max_shake),
        "hard_cut": ("cut", "<=", rules.max_cut),
        "blurred": ("sharpness", ">=", rules.min_sharpness),
        "border": ("share of black borders", "<=", rules.max_border),
        "text": ("share of text", "<=", rules.max_text),
        "caption": ("words of the caption", ">=", rules.min_words),
        "duplicate": ("distance", ">=", rules.min_distance),
        **{network.name: (f"score of {network.name}", ">=", network.at_least) for network in rules.networks},
    }


def find_broken_rule(file: FileMeasures, part: Part, values: dict[str, float], rules: FilterRules, shape: ModelShape) -> Rejection | None:
    """Return the first rule that a part breaks, or None. `values` are those of list_values."""
    for reason, (name, comparison, bound) in list_bounds(rules).items():
        if reason in values and not keeps_bound(values[reason], comparison, bound):
            return Rejection(reason, values[reason], f"{name} {comparison} {bound}{explain_value(reason, file, part, rules, shape)}")
        if reason == "too_short" and (usable := shape.count_usable(part.length)) < shape.frames:
            need = f"frames >= {shape.frames} at {shape.fps:g} fps ({shape.frames / shape.fps:.2f} s), which training needs"
            return Rejection(reason, values[reason], f"{need}; {usable} of its {part.length} are whole latents")
    return None


def find_duplicate(signature: np.ndarray, accepted: DuplicateIndex, rules: FilterRules) -> tuple[Likeness | None, Rejection | None]:
    """Return the most similar clip of those accepted before, and the rejection if it is too similar."""
    likeness = accepted.find_closest(signature)
    if likeness is None or likeness.distance >= rules.min_distance:
        return likeness, None
    how = "a mirror image of" if likeness.mirrored else "from"
    return likeness, Rejection("duplicate", likeness.distance, f"distance >= {rules.min_distance} ({how} {likeness.clip})")


def keeps_bound(value: float, comparison: str, bound: float) -> bool:
    """Say whether a value is on the right side of its threshold."""
    return value > bound if comparison == ">" else value >= bound if comparison == ">=" else value <= bound


def explain_value(reason: str, file: FileMeasures, part: Part, rules: FilterRules, shape: ModelShape) -> str:
    """Say what a rule's number does not: frames beside seconds, both sides of a picture, the time of a cut."""
    if reason == "too_short":
        fewest = int(Fraction(rules.min_seconds) * Fraction(shape.fps)) + 1
        return f", {fewest} frames at {shape.fps:g} fps; it has {part.length}"
    if reason in ("too_small", "cropped"):
        return f"; it is {file.facts.width}x{file.facts.height}, the model's {shape.width}x{shape.height}"
    if reason == "hard_cut":
        frames = np.flatnonzero(file.cuts[part.first + 1 : part.end] > rules.max_cut) + part.first + 1
        return f" (at {', '.join(f'{frame / shape.fps:.2f}' for frame in frames[:8])} s{', …' if len(frames) > 8 else ''})"
    return ""


def measure_kept_share(tall: int, wide: int, shape: ModelShape) -> float:
    """Measure how much of a picture is left when it covers the model's shape and is cut to its middle."""
    ratio = (wide * shape.height) / (tall * shape.width)
    return min(ratio, 1 / ratio)


def count_words(caption: str) -> int:
    """Count the words of a caption that say something: of letters, and no camera's or program's name for a file."""
    return sum(1 for word in WORD.findall(JUNK.sub(" ", caption)))


def describe_part(file: FileMeasures, part: Part) -> dict[str, Any]:
    """Return a part's place in its file for the manifest; both None if it is all of the file."""
    whole = part.first == 0 and part.end == file.frames
    return {"start": None if whole else part.first, "length": None if whole else part.length}
