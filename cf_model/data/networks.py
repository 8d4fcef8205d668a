"""Networks that judge clips or describe them, by an import path: none of them is part of this project, and none is downloaded.

A network is a class of an installed module, made with the path of its weights. It is asked about clips that pass every other rule, and
shown PICTURES of each, as the model will see them. Its answers are stored, so that a clip is shown once.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from .clip_pool import PayloadCache
from .filter import ModelShape, Part
from .subprocess_reader import StreamingReader
from .video_reader import PictureConverter, VideoFile

PICTURES = 8  # of each clip, from its first frame to its last
SCORE, DESCRIBE = "score_clip", "describe_clip"


class ClipScorer(Protocol):
    """A network that gives a clip a number, such as an aesthetic score; more is better."""

    def score_clip(self, pictures: UInt8[np.ndarray, "V Y X 3"], caption: str) -> float: ...


class ClipCaptioner(Protocol):
    """A network that describes a clip."""

    def describe_clip(self, pictures: UInt8[np.ndarray, "V Y X 3"]) -> str: ...


class NetworkSpec(Protocol):
    """An entry of filter.networks, or filter.captioner."""

    @property
    def code(self) -> str: ...  # package.module:Class
    @property
    def weights(self) -> Path: ...


def load_network(key: str, spec: NetworkSpec, method: str) -> Any:
    """Import and make a network. Raises ValueError, which names the parameter `key`, if its code or its weights are not here."""
    module, _, name = spec.code.partition(":")
    found: Any
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{key}.code is {spec.code}, which can't be imported ({error}); install it, or take the entry out") from None
    if not inspect.isclass(found) or not callable(getattr(found, method, None)):
        raise ValueError(f"{key}.code is {spec.code}, which is no class with a method {method}; see cf_model/data/networks.py")
    if not spec.weights.exists():
        raise ValueError(f"{key}.weights is {spec.weights}, which is not there; fetch it by hand, or take the entry out")
    network: Any = found
    return network(spec.weights)


class ClipNetworks:
    """The networks of params.filter, the reader of what they are shown, and their stored answers. Use as a context manager."""

    def __init__(self, scorers: dict[str, ClipScorer], captioner: ClipCaptioner | None, shape: ModelShape, timeout: float) -> None:
        self.scorers, self.captioner, self.shape = scorers, captioner, shape
        self.reader = StreamingReader(pick_pictures, timeout=timeout)
        self.cache: PayloadCache | None = None  # which depends on their code: it is made when they are loaded

    def __enter__(self) -> ClipNetworks:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.end()

    def score_clip(self, path: Path, content: str, part: Part, caption: str) -> dict[str, float]:
        """Return every scorer's number of a clip, by its name. Raises ValueError for a file that can't be read."""
        return self._ask(f"score {content} {part.first} {part.end} {caption}", path, part, lambda pictures: self._score(pictures, caption))

    def describe_clip(self, path: Path, content: str, part: Part) -> str:
        """Return the captioner's description of a clip, on one line."""
        assert self.captioner is not None
        describe = self.captioner.describe_clip
        return self._ask(f"describe {content} {part.first} {part.end}", path, part, lambda shown: " ".join(describe(shown).split()))

    def _score(self, pictures: np.ndarray, caption: str) -> dict[str, float]:
        scores = {name: float(scorer.score_clip(pictures, caption)) for name, scorer in self.scorers.items()}
        for name, score in scores.items():
            if not math.isfinite(score):
                raise RuntimeError(f"filter.networks: {name} gives {score} for a clip; look at its code")
        return scores

    def _ask(self, question: str, path: Path, part: Part, ask: Any) -> Any:
        """Return the answer to a question about a clip, from the cache if it was asked before."""
        if self.cache and (stored := self.cache.get(question)):
            return json.loads(stored)
        shape = self.shape
        size = {"height": shape.height, "width": shape.width, "fps": shape.fps}
        answer = ask(np.stack(list(self.reader.stream(path, first=part.first, length=part.length, **size))))
        if self.cache:
            self.cache.put(question, json.dumps(answer).encode())
        return answer


def pick_pictures(path: Path, *, first: int, length: int, height: int, width: int, fps: float) -> Iterator[UInt8[np.ndarray, "Y X 3"]]:
    """Yield PICTURES frames of a part of a file, evenly from its first to its last, in the model's shape."""
    wanted = list_places(first, length)
    convert = PictureConverter()
    with VideoFile(path) as file:
        pictures = file.sample(fps, lambda frame: file.fit_picture(frame, height, width, convert), start=first)
        for place, picture in enumerate(pictures, first):
            if place in wanted:
                yield np.ascontiguousarray(picture)
            if place == wanted[-1]:
                return


def list_places(first: int, length: int) -> Sequence[int]:
    """Return the frames of a part that a network is shown."""
    return sorted({round(first + k * (length - 1) / max(1, PICTURES - 1)) for k in range(PICTURES)})
