"""What decord and this project's reader see of a file; decord runs in child processes, because it crashes and hangs on some files."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from cf_model.data.video_reader import PictureConverter, VideoFile

Seen = tuple[list[float], float]  # grey levels of the frames, and seconds of CPU time


def read_by_decord(path: Path) -> Seen:
    """Read a file from frame 0 to its last without a jump, as decord is right most often."""
    import decord

    began = time.process_time()
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        pictures = [reader.next().asnumpy() for _ in range(len(reader))]
    except (RuntimeError, StopIteration, decord.DECORDError) as error:
        raise ValueError(" ".join(str(error).split())[:100]) from None
    spent = time.process_time() - began
    return [float(picture.mean()) for picture in pictures], spent


def read_by_pyav(path: Path) -> Seen:
    """Read all frames at their full size, as decord does."""
    began, convert = time.process_time(), PictureConverter()
    with VideoFile(path) as file:
        pictures = [convert(frame, frame.height, frame.width).copy() for _, frame in file.decode()]
    spent = time.process_time() - began
    return [float(np.mean(picture)) for picture in pictures], spent
