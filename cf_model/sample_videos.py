"""Sample videos of a training stage, as files and as W&B media."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.codec.interface import Codec
from cf_model.data.video import measure_clipped_share, write_video
from cf_model.model import checkpoint
from cf_model.train.trainer.samples import ContinuedSpec, SampleSpec

from .device import choose_device

MakeSample = Callable[[Tensor, Tensor, torch.Generator], Iterator[Tensor]]  # prompt, real beginning, noise -> latents, part by part


class SampleLog(Protocol):
    """Where samples are shown (tasks/runner/track.py implements it)."""

    work: Path
    first: bool  # whether this process is the first of the ranks

    def show(self, step: int, files: Mapping[str, Path], captions: Mapping[str, str]) -> None: ...


class HeldoutClips(Protocol):
    """Clips whose captions and beginnings are sampled from, as cf_model/data/latents.py reads them."""

    fps: float

    def rows(self, split: Literal["train", "heldout"], at_least: int = 1) -> list[int]: ...
    def captions(self, rows: Sequence[int]) -> list[str]: ...
    def window(self, rows: Sequence[int], starts: Sequence[int], length: int) -> Tensor: ...
    def text(self, rows: Sequence[int]) -> Tensor: ...


class SampleWriter:
    """Makes the samples of a training: `fit` calls it after every step, on every rank, because a model's passes may communicate.

    Only the first rank decodes and writes. A step's videos are written before the checkpoint that says the step is done, so a run that
    resumes from it has them, and a run that repeats the step writes the same bytes again.
    """

    def __init__(self, spec: SampleSpec, track: SampleLog, clips: HeldoutClips, codec: Path, make: MakeSample) -> None:
        self.spec, self.track, self.clips, self.folder, self.make = spec, track, clips, codec, make
        self.prefix = spec.prefix if isinstance(spec, ContinuedSpec) else 0
        self.rows = clips.rows("heldout", at_least=max(self.prefix, 1))[: spec.prompts] if spec.every else []

    @cached_property
    def codec(self) -> Codec:
        """The codec, loaded at the first sample."""
        with torch.random.fork_rng(devices=[]):  # building its networks draws random numbers that training must not miss
            return load_codec(self.folder).to(choose_device())

    def __call__(self, step: int) -> dict[str, float]:
        """Make, write and show the samples of a step, where `every` asks for them.

        Returns `clipped`, the share of their pixels that are black or white: in the log of the first rank, which decodes them.
        """
        if not self.spec.every or step % self.spec.every:
            return {}
        files: dict[str, Path] = {}
        shares: list[float] = []  # of the frames of all videos
        for number, row in enumerate(self.rows):
            text, real = self.clips.text([row]), self.clips.window([row], [0], self.prefix)
            with torch.no_grad():
                parts = list(self.make(text.to(choose_device()), real.to(choose_device()), self.spec.rng(number, choose_device())))
            if self.track.first:
                path = files[f"samples/{number}"] = self.track.work / "samples" / f"step-{step:06d}-{number}.mp4"
                path.parent.mkdir(exist_ok=True)
                frames = self._decode(parts, shares)
                with checkpoint.refuse_full_disk(self.track.work, path.name):
                    write_video(path, frames, fps=self.clips.fps, crf=self.spec.crf)
        if files:
            self.track.show(step, files, dict(zip(files, self.clips.captions(self.rows), strict=True)))
        return {"clipped": sum(shares) / len(shares)} if shares else {}

    def _decode(self, parts: list[Tensor], shares: list[float]) -> Iterator[np.ndarray]:
        """Yield a video's frames [Y, X, 3], and append each frame's share of black and white pixels to `shares`."""
        for part in self.codec.decode_stream(parts):
            for frame in part[0].numpy():
                shares.append(measure_clipped_share(frame))
                yield frame
