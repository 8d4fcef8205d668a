"""Simulated failures: videos of rendered worlds in which one thing goes wrong after the first seconds, and all else is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cf_model.data import worlds

FPS, FRAMES, PREFIX = 16, 481, 81  # 30 s; a failure begins after the first 5 s
FORGOTTEN = 4  # seconds out of sight after which a hill is invented anew
Video = np.ndarray


def render(world: worlds.World, frames: int = FRAMES) -> Video:
    return worlds.render_clip(world, frames, height=32, width=32, fps=FPS)


def forget(world: worlds.World) -> Video:
    """Give a hill another colour each time that it comes back after more than 4 s."""
    rng = np.random.default_rng(world.seed)
    heading = world.heading(np.arange(FRAMES) / FPS)
    colours, shown, last = list(world.landmarks), [], np.zeros(worlds.LANDMARKS)
    middles = (np.arange(worlds.LANDMARKS) + 0.5) * worlds.PANORAMA / worlds.LANDMARKS
    for frame, left in enumerate(heading):
        view = (middles - left + 9) % worlds.PANORAMA < 32 + 18  # any part of the hill
        for k in np.flatnonzero(view):
            if frame - last[k] > FORGOTTEN * FPS and frame > PREFIX:
                colours[k] = str(rng.choice([name for name in worlds.COLOURS if name != colours[k]]))
            last[k] = frame
        shown.append(tuple(colours))
    out = render(world)
    for landmarks in sorted(set(shown)):
        frames = [k for k, some in enumerate(shown) if some == landmarks]
        out[frames] = render(replace(world, landmarks=landmarks))[frames]
    return out


def grow(first: float, last: float) -> np.ndarray:
    """A number for every frame, from `first` at the prefix's end to `last` at the video's."""
    return np.interp(np.arange(FRAMES), [PREFIX, FRAMES - 1], [first, last])[:, None, None, None]


def scale(world: worlds.World, last: float) -> Video:
    return np.clip(render(world) * grow(1, last), 0, 255).astype(np.uint8)


def add_noise(world: worlds.World) -> Video:
    noise = np.random.default_rng(world.seed).normal(size=(FRAMES, 32, 32, 3))
    return np.clip(render(world) + noise * grow(0, 60), 0, 255).astype(np.uint8)


def blur(world: worlds.World) -> Video:
    """Mix each frame more and more with its mean over 5 x 5 pixels."""
    video = render(world).astype(float)
    wide = np.pad(video, ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
    soft = sum(wide[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)) / 25
    return np.rint(video + (soft - video) * grow(0, 1)).astype(np.uint8)


def pick_frames(world: worlds.World, number: Callable[[np.ndarray], np.ndarray]) -> Video:
    return render(world)[number(np.arange(FRAMES))]


FAILURES: dict[str, Callable[[worlds.World], Video]] = {
    "perfect": render,
    "forget": forget,
    "over-expose": lambda world: scale(world, 2.0),
    "darken": lambda world: scale(world, 0.3),
    "noise": add_noise,
    "blur": blur,
    "stagnate": lambda world: pick_frames(world, lambda k: np.minimum(k, 15 * FPS)),
    "reset": lambda world: pick_frames(world, lambda k: np.where(k < 16 * FPS, k, k - 16 * FPS)),
    "loop": lambda world: pick_frames(world, lambda k: k % (6 * FPS)),
}
