"""Small pictures of clips for the report's contact sheet.

Unknown files are decoded in child processes with a limit, from their beginning and only as far as the pictures need.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from .subprocess_reader import Unreadable, read_in_subprocess
from .video_reader import PictureConverter, VideoFile

Row = Mapping[str, Any]  # of the manifest
PICTURES = 3  # of a clip, a second apart
HEIGHT = 48  # pixels
WIDEST = 4  # times the height; wider pictures are squeezed, so that a clip of 4096x64 is no ribbon across the page


def draw_clips(rows: Sequence[Row], folder: Path, *, fps: float, workers: int, timeout: float) -> dict[str, str]:
    """Return pictures of clips as data addresses, by clip's id; a file that can't be read in `timeout` seconds has none."""
    wanted: dict[str, dict[str, int]] = {}
    for row in rows:
        wanted.setdefault(row["file"], {})[row["id"]] = round((row.get("start") or 0) / fps)
    files = [folder / name for name in wanted]
    reading = read_in_subprocess(partial(read_pictures, wanted=wanted), files, workers=workers, timeout=timeout)
    found = [drawn for _, drawn in reading if not isinstance(drawn, Unreadable)]
    return {clip: f"data:image/jpeg;base64,{base64.b64encode(content).decode()}" for drawn in found for clip, content in drawn.items()}


def read_pictures(path: Path, wanted: Mapping[str, Mapping[str, int]]) -> dict[str, bytes]:
    """Return a JPEG of PICTURES frames for each part of a file; `wanted`: file's name -> clip's id -> the second at which it begins."""
    drawn = {}
    for clip, second in wanted[path.name].items():
        with VideoFile(path) as file:
            pictures = list(islice(file.sample(1.0, partial(shrink_picture, file, PictureConverter()), start=second), PICTURES))
        if pictures:
            content = io.BytesIO()
            Image.fromarray(np.concatenate(pictures, axis=1)).save(content, "jpeg", quality=80)
            drawn[clip] = content.getvalue()
    return drawn


def shrink_picture(file: VideoFile, convert: PictureConverter, frame: av.VideoFrame) -> np.ndarray:
    """Return a frame upright and HEIGHT pixels high."""
    width = min(max(1, round(HEIGHT * file.width / file.height)), WIDEST * HEIGHT)
    return np.ascontiguousarray(file.turn_picture(frame, HEIGHT, width, convert))
