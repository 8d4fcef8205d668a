"""A small world that can be measured: a camera pans over a cyclic panorama, a sprite moves in its sky.

All that a metric needs is known: the landmarks (drawn at random and never named in the caption, so that a landmark
that comes back must come from memory), the sprite's colour and shape and the sky (named in the caption), and the
camera's heading, which the strip at the bottom shows as a hue and can therefore be read off any generated frame.
Lengths are in units of 1/32 of the picture's height, so a world looks the same at every size.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

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
PANORAMA = 96  # units around the whole circle
LANDMARKS = 8
SCENE = 24  # rows of the scene; the compass strip has the rest up to 32
SKY_ROWS = slice(1, 7)
SPRITE_ROWS = slice(1, 12)
LANDMARK_ROWS = slice(16, 23)
COMPASS_ROWS = slice(25, 31)


@dataclass(frozen=True)
class World:
    """Facts of a clip before it is rendered; `truth` is the part that a metric may use."""

    seed: int
    colour: str
    shape: str
    sky: str
    speed: str
    landmarks: tuple[str, ...]
    start: float  # heading of the middle of the pan, units
    amplitude: float  # of the pan, units
    phase: float
    path: tuple[float, float, float, float]  # sprite: frequencies (Hz) and phases in x and y

    @property
    def caption(self) -> str:
        """The prompt: sprite, sky and speed, but never the landmarks."""
        return f"a {self.colour} {self.shape} in the {self.sky}, the camera pans {self.speed}"

    def heading(self, seconds: np.ndarray) -> np.ndarray:
        """Return the heading of the picture's left edge at these times, in units; not wrapped."""
        swing = np.sin(self.phase + seconds * SPEEDS[self.speed] / self.amplitude * np.pi / 2)
        return self.start + self.amplitude * 2 / np.pi * np.arcsin(0.97 * swing)  # a triangle with round corners

    def truth(self, frames: int, fps: float) -> dict[str, object]:
        """Return what a metric may use, with the heading of each frame in 0..PANORAMA."""
        seconds = np.arange(frames) / fps
        return {
            "colour": self.colour,
            "shape": self.shape,
            "sky": self.sky,
            "speed": self.speed,
            "landmarks": list(self.landmarks),
            "heading": [round(float(h) % PANORAMA, 3) for h in self.heading(seconds)],
        }


def draw_world(seed: int) -> World:
    """Draw the world of a seed."""
    rng = np.random.default_rng(seed)

    def pick(names: object) -> str:
        names = tuple(names)  # type: ignore[arg-type]
        return str(names[rng.integers(len(names))])

    return World(
        seed=seed,
        colour=pick(COLOURS),
        shape=pick(SHAPES),
        sky=pick(SKIES),
        speed=pick(SPEEDS),
        landmarks=tuple(pick(COLOURS) for _ in range(LANDMARKS)),
        start=float(rng.uniform(0, PANORAMA)),
        amplitude=float(rng.uniform(22, 30)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        path=(float(rng.uniform(0.08, 0.16)), float(rng.uniform(0.08, 0.16)), *rng.uniform(0, 2 * np.pi, 2).tolist()),
    )


def paint_panorama(landmarks: tuple[str, ...], sky: str, unit: int) -> np.ndarray:
    """Paint the scene all around, [SCENE * unit, PANORAMA * unit, 3] float in 0..255, without sprite and compass."""
    top, bottom = (np.array(c, float) for c in SKIES[sky])
    rows = (np.arange(SCENE * unit) + 0.5) / unit
    columns = (np.arange(PANORAMA * unit) + 0.5) / unit
    image = top + (bottom - top) * (rows / SCENE)[:, None, None] * np.ones((1, len(columns), 1))
    width = PANORAMA / len(landmarks)
    for i, name in enumerate(landmarks):
        away = (columns - (i + 0.5) * width + PANORAMA / 2) % PANORAMA - PANORAMA / 2
        bump = np.clip(np.cos(np.clip(away / width, -0.75, 0.75) * np.pi / 1.5), 0, 1) ** 1.2
        hill = 1 / (1 + np.exp(-(rows[:, None] - 18 + 6 * bump[None]) / 1.3)) * np.minimum(1, 1.6 * bump)[None]
        image += hill[..., None] * (np.array(COLOURS[name], float) - image)
    return image


def paint_compass(unit: int) -> np.ndarray:
    """Paint the strip under the panorama, whose hue is the heading: [(32 - SCENE) * unit, PANORAMA * unit, 3]."""
    hues = np.array([colorsys.hsv_to_rgb((i + 0.5) / (PANORAMA * unit), 0.9, 0.9) for i in range(PANORAMA * unit)])
    return np.repeat(255 * hues[None], (32 - SCENE) * unit, axis=0)


def render_clip(world: World, frames: int, *, height: int, width: int, fps: float) -> np.ndarray:
    """Render a clip, uint8 [frames, height, width, 3]. `height` must be a multiple of 32."""
    unit = height // 32
    around = np.concatenate([paint_panorama(world.landmarks, world.sky, unit), paint_compass(unit)])
    seconds = np.arange(frames) / fps
    left = world.heading(seconds) * unit
    columns = left[:, None] + np.arange(width)
    first = np.floor(columns).astype(int)  # [V, X]; the picture lies between two columns of the panorama
    part = (columns - first)[:, None, :, None]
    size = PANORAMA * unit
    out = np.take(around, first % size, axis=1).transpose(1, 0, 2, 3) * (1 - part)
    out += np.take(around, (first + 1) % size, axis=1).transpose(1, 0, 2, 3) * part
    fx, fy, px, py = world.path
    span = width / unit
    x = span / 2 + (span / 2 - 8) * np.sin(2 * np.pi * fx * seconds + px)
    y = 6.5 + 1.2 * np.sin(2 * np.pi * fy * seconds + py)
    rows = (np.arange(SCENE * unit) + 0.5) / unit
    dx = np.abs((np.arange(width) + 0.5)[None, None] / unit - x[:, None, None])
    dy = np.abs(rows[None, :, None] - y[:, None, None])
    half = {"disc": (0.0, 0.0), "bar": (4.6, 0.0), "post": (0.0, 3.0)}[world.shape]  # of the line it is drawn around
    radius = {"disc": 4.2, "bar": 2.4, "post": 2.3}[world.shape]
    edge = np.hypot(np.maximum(dx - half[0], 0), np.maximum(dy - half[1], 0)) - radius
    inside = 1 / (1 + np.exp(edge / 0.5))[..., None]
    scene = out[:, : SCENE * unit]
    scene += inside * (np.array(COLOURS[world.colour], float) - scene)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
