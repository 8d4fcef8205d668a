"""The clip that `cf video` continues, read at the model's size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .data.subprocess_reader import Unreadable, read_in_subprocess
from .data.video_reader import VideoFacts, probe_video, read_video
from .folder import Recipe

READ_SECONDS = 600.0  # in which the clip must be read


def read_clip(path: Path, recipe: Recipe, *, resize: bool) -> np.ndarray:
    """Read a clip as frames [F, H, W, 3], in a child process, because any file may be named.

    Raises ValueError for a file that can't be read, and for another size unless `resize` lets the clip be scaled and cut.
    """
    if not path.is_file():
        raise ValueError(f"--continue-from {path} is not there; name a video file")
    facts = _read_in_child(probe_video, path)
    if isinstance(facts, VideoFacts) and (facts.height, facts.width) != (recipe.height, recipe.width) and not resize:
        sizes = f"--continue-from {path} is {facts.width} x {facts.height}, but the model makes {recipe.width} x {recipe.height}"
        raise ValueError(f"{sizes}; add --resize to cover that size and cut the middle out")
    frames: np.ndarray = _read_in_child(partial(read_video, height=recipe.height, width=recipe.width, fps=recipe.fps), path)
    return frames


def _read_in_child(task: Any, path: Path) -> Any:
    """Call `task` on a file in a child process. Raises ValueError if the file can't be read."""
    [(_, answer)] = read_in_subprocess(task, [path], workers=1, timeout=READ_SECONDS)
    if isinstance(answer, Unreadable):
        raise ValueError(f"--continue-from {path}: {answer.sentence}")
    return answer
