"""Bad clips that are made on purpose among the rendered ones, so that it can be said whether the filter finds them."""

from __future__ import annotations

import numpy as np

from . import worlds

# Kinds of bad clips that are planted, and the reason for which the stage filter should reject each. Only tests and the report may read
# a row's `planted`, because the filter must find the bad clips from the video alone.
PLANTED = {
    "too_short": "too_short",
    "frozen": "frozen",
    "hard_cut": "hard_cut",
    "blown_out": "clipped",
    "duplicate": "duplicate",
    "truncated": "unreadable",
    "wrong_fps": "wrong_fps",
}
SHORT_SECONDS = 6  # length of a clip that is too short
WRONG_FPS = 8  # frame rate of a clip that has too few frames a second
OVEREXPOSED = 0.4  # quantile, over all frames, of each pixel's darkest channel; the pixels above it become white
WORSE_CRF = 6  # added to clips.crf for the second encoding of a duplicate, which is then coarser than the first


def draw_kinds(count: int, bad: int, rng: np.random.Generator) -> list[str | None]:
    """Shuffle `count` good clips (None) and `bad` clips of each kind. The first is good, because a duplicate repeats an earlier one."""
    kinds: list[str | None] = [None] * count + [kind for kind in PLANTED for _ in range(bad)]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    first = kinds.index(None)
    kinds[0], kinds[first] = kinds[first], kinds[0]
    return kinds


def render_kind(
    kind: str | None, world: worlds.World, other: worlds.World, frames: int, size: tuple[int, int], fps: int, rng: np.random.Generator
) -> np.ndarray:
    """Render the frames of a clip of some kind, uint8 [frames, *size, 3]. Of a truncated clip the file is cut after it is written."""

    def render(of: worlds.World, frames: int, fps: int = fps) -> np.ndarray:
        return worlds.render_clip(of, frames, height=size[0], width=size[1], fps=fps)

    if kind == "too_short":
        return render(world, SHORT_SECONDS * fps)
    if kind == "wrong_fps":
        return render(world, max(1, frames * WRONG_FPS // fps), WRONG_FPS)
    if kind == "frozen":
        return render(world, 1).repeat(frames, axis=0)
    video = render(world, frames)
    if kind == "hard_cut":
        at = int(frames * rng.uniform(0.2, 0.8))
        return np.concatenate([video[:at], render(other, frames)[at:]])
    if kind == "blown_out":
        white = max(1.0, float(np.quantile(video.min(-1), OVEREXPOSED)))
        return np.rint(np.minimum(255.0, video * (255.0 / white))).astype(np.uint8)
    return video
