"""Bad clips that are made on purpose among the rendered ones, so that it can be said whether the filter finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import worlds
from .video import write_video
from .video_reader import read_video

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


@dataclass(frozen=True)
class RenderedClip:
    """A clip that was written, and what is known of it."""

    file: Path
    caption: str
    planted: str | None  # the kind of fault; None: a good clip
    truth: dict[str, object] | None  # `World.truth` of a good clip: the others show no known world, or do not show it unchanged


def render_clips(
    folder: Path, spec: worlds.WorldSpec, *, count: int, bad: int, frames: int, crf: int, seed: int, size: tuple[int, int], fps: int
) -> Iterator[RenderedClip]:
    """Render `count` good clips and `bad` of each bad kind to clip-NNNNN.mp4; size is height and width in pixels.

    The kinds are shuffled, because otherwise a clip's number would tell its kind.
    """
    if size[0] % 32 or size[1] % 2:
        sizes = f"video.height is {size[0]} and video.width {size[1]}"
        raise ValueError(f"{sizes}; a world's height is a multiple of 32, its width even: use 32 and 32")
    rng = np.random.default_rng(seed)
    good: list[RenderedClip] = []
    for i, kind in enumerate(draw_kinds(count, bad, rng)):
        # Each clip has two seeds of worlds for itself, because a hard cut needs a second world. Each value of the seed has a million seeds
        # of worlds, so runs of different seeds share none.
        world, other = (worlds.draw_world(seed * 1_000_000 + 2 * i + j, spec) for j in range(2))
        path, caption, quality = folder / f"clip-{i:05d}.mp4", world.caption, crf
        if kind == "duplicate":
            twin = good[rng.integers(len(good))]
            caption, quality = twin.caption, min(51, crf + WORSE_CRF)
            video = read_video(twin.file, height=size[0], width=size[1], fps=fps)
        else:
            video = render_kind(kind, world, other, frames, size, fps, rng)
        write_video(path, video, fps=WRONG_FPS if kind == "wrong_fps" else fps, crf=quality)
        if kind == "truncated":
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * rng.uniform(0.3, 0.9))])
        clip = RenderedClip(path, caption, kind, world.truth(frames, fps) if kind is None else None)
        if kind is None:
            good.append(clip)
        yield clip


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
