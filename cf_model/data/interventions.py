"""Pairs of worlds that differ in a single fact, last seen a known time ago: what a model remembers is shown by what it then makes.

A pair is one world twice, but for the colour of one hill. The hill was in view, then out of sight, and is about to come back. A model
that goes on from either clip with the same noise can only tell the two apart by what it remembers (docs/evaluation.md, 3.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

from .worlds import COLOURS, LANDMARKS, PANORAMA, World, WorldSpec, draw_world, render_clip

WIDTH = 32  # units of a picture
OUT = 9.0  # units that the middle of a hill is outside the picture when nothing of the hill is in it
BACK = 3.0  # the same, when so much of the hill is in it that its colour shows
SEEN = 8  # frames, at least, in which the middle of the hill was in view
ASKED = 1 / 4  # part, at least, of the frames that are made in which the hill is back
MOST_TRIED = 4000  # worlds


@dataclass(frozen=True)
class FactPair:
    """Two worlds that differ in the colour of one hill, which was out of sight for `away` seconds before the asked frames."""

    first: World
    second: World
    lag: float  # seconds that were asked for
    away: float


def measure_lags(world: World, *, sink: int, start: int, stop: int, fps: float) -> dict[int, float]:
    """Return for how many seconds hills are out of sight before frame `start`: those that were seen, and come back before `stop`.

    Hills that the first `sink` frames show are left out, because a memory may keep those frames for ever.
    """
    middles = (np.arange(LANDMARKS) + 0.5) * PANORAMA / LANDMARKS - world.heading(np.arange(stop) / fps)[:, None] - WIDTH / 2
    outside = np.abs((middles + PANORAMA / 2) % PANORAMA - PANORAMA / 2) - WIDTH / 2  # [stop, LANDMARKS] units beyond the picture's edge
    seen = ((outside[:start] < 0).sum(axis=0) >= SEEN) & ~(outside[:sink] < OUT).any(axis=0)
    chosen = np.flatnonzero(seen & ((outside[start:] < BACK).mean(axis=0) >= ASKED))
    return {int(hill): float(start - 1 - np.flatnonzero(outside[:start, hill] < OUT)[-1]) / fps for hill in chosen}


def find_pairs(lag: float, count: int, spec: WorldSpec, *, seed: int, sink: int, start: int, stop: int, fps: float) -> Iterator[FactPair]:
    """Yield at most `count` pairs whose fact was last seen `lag` to 2 `lag` seconds (of 0: below 1 s) before frame `start`.

    There are fewer where the camera's path hardly ever leaves a hill for so long. `sink`, `start` and `stop` are in frames.
    """
    found = 0
    for number in range(MOST_TRIED):
        world = draw_world(seed + number, spec)
        lags = measure_lags(world, sink=sink, start=start, stop=stop, fps=fps).items()
        for hill, away in [entry for entry in lags if lag <= entry[1] < max(1.0, 2 * lag)][:1]:
            other = [name for name in COLOURS if name != world.landmarks[hill]][number % (len(COLOURS) - 1)]
            landmarks = (*world.landmarks[:hill], other, *world.landmarks[hill + 1 :])
            yield FactPair(world, replace(world, landmarks=landmarks), lag, away)
            found += 1
        if found == count:
            return


def render_pairs(pairs: Sequence[FactPair], frames: int, *, height: int, width: int, fps: float) -> UInt8[np.ndarray, "2 N V Y X 3"]:
    """Render both worlds of each pair, the first worlds first."""
    sides = [[pair.first for pair in pairs], [pair.second for pair in pairs]]
    return np.array([[render_clip(world, frames, height=height, width=width, fps=fps) for world in worlds] for worlds in sides])
