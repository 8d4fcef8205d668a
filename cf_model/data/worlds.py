"""Synthetic training clips whose every fact is known: a camera pans over a circular panorama, and a sprite moves in the picture.

A video model is trained on these clips, and metrics (cf_model/evaluate/oracle.py) compare the model's videos with the world's facts.
The caption names the sprite's colour and shape, the sky and the speed. The caption never names the landmarks, which are hills of
random colours, because then a landmark that returns to view in its old colour shows that the model remembered it. The heading is the
place in the panorama of the picture's left edge; every frame shows it, because the strip at the bottom has another hue at each place.
The sprite moves within the picture and does not follow the camera. On the path `orbit` the camera goes round and round instead of back
and forth, so that almost all it sees was seen before and went out of sight: only a long memory knows it. Lengths are in units of 1/32 of the picture's height, so that a world
looks the same at every size.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "magenta": (210, 60, 200),
    "cyan": (60, 210, 220),
}
SKIES = {  # top and bottom of the gradient
    "day": ((150, 200, 245), (215, 235, 250)),
    "dusk": ((90, 50, 110), (245, 150, 90)),
    "night": ((10, 12, 40), (40, 45, 90)),
    "fog": ((170, 170, 170), (215, 215, 210)),
}
SHAPES = ("disc", "bar", "post")
SPEEDS = {"slow": 5.5, "fast": 10.0}  # units a second
ORBIT_SPEEDS = {"slow": (8.0, 10.0), "fast": (10.0, 12.0)}  # least and most units a second
BURST = (3.0, 6.0)  # least and most seconds of a rest and the rush after it
PANORAMA = 96  # units around the whole circle
LANDMARKS = 8  # number of hills around the circle
SCENE = 24  # height of sky, hills and sprite together, in units; the strip of hues, the compass, has the other 8
# where metrics look for the sky, the sprite, the hills and the compass: rows in units, with a margin to what lies beside
SKY_ROWS = slice(1, 7)
SPRITE_ROWS = slice(1, 12)
LANDMARK_ROWS = slice(16, 23)
COMPASS_ROWS = slice(25, 31)


@dataclass(frozen=True)
class WorldSpec:
    """How the camera moves in all worlds of a set. Worlds of the same seed have the same landmarks, sprite and sky in every set."""

    path: Literal["pan", "orbit"]  # back and forth over a part of the circle, or round and round
    motion: Literal["steady", "bursty"]  # bursty: a third of the time the camera rests, then it makes up for that


PLAIN = WorldSpec(path="pan", motion="steady")


@dataclass(frozen=True)
class World:
    """Facts of a clip before it is rendered."""

    seed: int
    colour: str
    shape: str
    sky: str
    speed: str
    landmarks: tuple[str, ...]
    centre: float  # heading about which the pan swings, in units
    amplitude: float  # peak of the pan before its corners are rounded, in units; the camera swings 0.84 of it to each side
    phase: float  # of the pan at second 0, in radians
    path: tuple[float, float, float, float]  # of the sprite: frequencies in x and y (Hz), phases in x and y (radians)
    turn: float = 0.0  # of an orbit: units a second, negative to the left; 0: the camera pans
    burst: tuple[float, float] | None = None  # of a bursty camera: seconds of rest and rush together, and the share gone by second 0

    @property
    def caption(self) -> str:
        """The clip's caption, which is the prompt for a video of this world: sprite, sky and speed, but never the landmarks."""
        verb = "circles" if self.turn else "pans"
        return f"a {self.colour} {self.shape} in the {self.sky}, the camera {verb} {self.speed}"

    def camera_seconds(self, seconds: np.ndarray) -> np.ndarray:
        """Return how long a steady camera would have moved by these times: a bursty one rests in the first third of a burst."""
        if self.burst is None:
            return seconds
        length, gone = self.burst
        bursts = np.append(seconds / length + gone, gone)  # the last one is second 0
        done = np.floor(bursts) + np.maximum(0, 1.5 * (bursts % 1) - 0.5)
        return length * (done[:-1] - done[-1])

    def heading(self, seconds: np.ndarray) -> np.ndarray:
        """Return the place of the picture's left edge at these times (seconds), in units, not wrapped to 0..PANORAMA.

        The pan is a triangle wave of slope SPEEDS[speed]; the factor 0.97 rounds its corners. An orbit is a straight line.
        """
        seconds = self.camera_seconds(seconds)
        if self.turn:
            return self.centre + self.turn * seconds
        swing = np.sin(self.phase + seconds * SPEEDS[self.speed] / self.amplitude * np.pi / 2)
        return self.centre + self.amplitude * 2 / np.pi * np.arcsin(0.97 * swing)

    def truth(self, frames: int, fps: float) -> dict[str, object]:
        """Return the facts that metrics compare a video with; `heading` is that of each frame, in units, in 0..PANORAMA."""
        seconds = np.arange(frames) / fps
        return {
            "colour": self.colour,
            "shape": self.shape,
            "sky": self.sky,
            "speed": self.speed,
            "landmarks": list(self.landmarks),
            "heading": [round(float(h) % PANORAMA, 3) for h in self.heading(seconds)],
        }


def draw_world(seed: int, spec: WorldSpec = PLAIN) -> World:
    """Choose a world at random; the same seed gives the same world."""
    rng = np.random.default_rng(seed)
    moves = np.random.default_rng((seed, 1))  # of its own, so that orbits and bursts change nothing else of a world

    def pick(names: Iterable[str]) -> str:
        names = tuple(names)
        return str(names[rng.integers(len(names))])

    colour, shape, sky, speed = pick(COLOURS), pick(SHAPES), pick(SKIES), pick(SPEEDS)
    turn = float(moves.uniform(*ORBIT_SPEEDS[speed]) * moves.choice([-1, 1]))
    burst = (float(moves.uniform(*BURST)), float(moves.uniform(0, 1)))
    return World(
        seed=seed,
        colour=colour,
        shape=shape,
        sky=sky,
        speed=speed,
        landmarks=tuple(pick(COLOURS) for _ in range(LANDMARKS)),
        centre=float(rng.uniform(0, PANORAMA)),
        amplitude=float(rng.uniform(22, 30)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        path=(float(rng.uniform(0.08, 0.16)), float(rng.uniform(0.08, 0.16)), *rng.uniform(0, 2 * np.pi, 2).tolist()),
        turn=turn if spec.path == "orbit" else 0.0,
        burst=burst if spec.motion == "bursty" else None,
    )


def paint_panorama(landmarks: tuple[str, ...], sky: str, pixels: int) -> np.ndarray:
    """Paint sky and landmarks of the whole circle, without sprite and compass; `pixels` is the length of a unit.

    Returns floats in 0..255, [SCENE * pixels, PANORAMA * pixels, 3]. A landmark is a hill of one colour with its peak at row 12 and its
    foot at row 18 (in units); neighbouring hills overlap.
    """
    top, bottom = (np.array(c, float) for c in SKIES[sky])
    rows, columns = ((np.arange(size * pixels) + 0.5) / pixels for size in (SCENE, PANORAMA))  # middles of the pixels, in units
    image = top + (bottom - top) * (rows / SCENE)[:, None, None] * np.ones((1, len(columns), 1))
    width = PANORAMA / len(landmarks)
    for i, name in enumerate(landmarks):
        # Distance of each column from the hill's middle, the shorter way round; then the hill's height there, 1 at its middle.
        away = (columns - (i + 0.5) * width + PANORAMA / 2) % PANORAMA - PANORAMA / 2
        bump = np.clip(np.cos(np.clip(away / width, -0.75, 0.75) * np.pi / 1.5), 0, 1) ** 1.2
        hill = 1 / (1 + np.exp(-(rows[:, None] - 18 + 6 * bump[None]) / 1.3)) * np.minimum(1, 1.6 * bump)[None]
        image += hill[..., None] * (np.array(COLOURS[name], float) - image)
    return image


def paint_compass(pixels: int) -> np.ndarray:
    """Paint the strip under the panorama, a rainbow around the circle, whose hue at the picture's left edge is the heading.

    Returns floats in 0..255, [(32 - SCENE) * pixels, PANORAMA * pixels, 3]; `pixels` is the length of a unit.
    """
    hues = np.array([colorsys.hsv_to_rgb((i + 0.5) / (PANORAMA * pixels), 0.9, 0.9) for i in range(PANORAMA * pixels)])
    return np.repeat(255 * hues[None], (32 - SCENE) * pixels, axis=0)


def render_clip(world: World, frames: int, *, height: int, width: int, fps: float) -> np.ndarray:
    """Render a clip, uint8 [frames, height, width, 3]. `height` must be a multiple of 32, because a unit is a whole number of pixels."""
    pixels = height // 32
    circle = np.concatenate([paint_panorama(world.landmarks, world.sky, pixels), paint_compass(pixels)])
    seconds = np.arange(frames) / fps
    # The picture: for each frame and column the place in the panorama, [frames, width] in pixels, which lies between two of its columns.
    columns = world.heading(seconds)[:, None] * pixels + np.arange(width)
    first = np.floor(columns).astype(int)
    share = (columns - first)[:, None, :, None]  # of the second of the two columns
    size = PANORAMA * pixels
    out = np.take(circle, first % size, axis=1).transpose(1, 0, 2, 3) * (1 - share)
    out += np.take(circle, (first + 1) % size, axis=1).transpose(1, 0, 2, 3) * share
    # The sprite's middle in every frame, in units: it stays 8 units away from the sides, and in the sky.
    fx, fy, px, py = world.path
    span = width / pixels
    x = span / 2 + (span / 2 - 8) * np.sin(2 * np.pi * fx * seconds + px)
    y = 6.5 + 1.2 * np.sin(2 * np.pi * fy * seconds + py)
    # The sprite is what lies within `radius` of a point (disc) or of a line of twice these half lengths in x and y (bar, post).
    rows = (np.arange(SCENE * pixels) + 0.5) / pixels
    dx = np.abs((np.arange(width) + 0.5)[None, None] / pixels - x[:, None, None])
    dy = np.abs(rows[None, :, None] - y[:, None, None])
    half = {"disc": (0.0, 0.0), "bar": (4.6, 0.0), "post": (0.0, 3.0)}[world.shape]
    radius = {"disc": 4.2, "bar": 2.4, "post": 2.3}[world.shape]
    outside = np.hypot(np.maximum(dx - half[0], 0), np.maximum(dy - half[1], 0)) - radius
    inside = 1 / (1 + np.exp(outside / 0.5))[..., None]
    scene = out[:, : SCENE * pixels]
    scene += inside * (np.array(COLOURS[world.colour], float) - scene)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
