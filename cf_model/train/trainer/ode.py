"""Trajectories of the base model, from noise to video, that a causal student regresses on (CausVid, Self-Forcing: ODE initialisation)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, gaussian
from cf_model.model.weights import check_whole

from .loop import Clips, Log, at_least
from .ranks import rank, ranks


@dataclass(frozen=True)
class OdeSpec:
    """What the base model is run for, and what of it is kept. Self-Forcing: 16,000 videos in 48 steps, shift 8, guidance 6."""

    videos: int
    batch: int  # made together, and lost together when the stage is killed
    steps: int
    keep: tuple[int, ...]  # steps before which the frames, as noisy as they are then, are kept; the finished ones always are
    shift: float
    guidance: float  # null + guidance (cond - null)
    context: Literal["noisy", "clean"]  # what a chunk sees of those before it: the states that they are at, or their x_0

    def __post_init__(self) -> None:
        at_least(1, videos=self.videos, batch=self.batch, steps=self.steps, shift=self.shift, guidance=self.guidance)
        if not self.keep or list(self.keep) != sorted({*self.keep}) or self.keep[0] < 0 or self.keep[-1] >= self.steps:
            raise ValueError(f"keep is {list(self.keep)}; name steps in rising order, from 0 to {self.steps - 1}: the end is kept anyway")

    def levels(self, flow: Flow) -> list[float]:
        """σ before every step, and 0."""
        return replace(flow, shift=self.shift).levels(self.steps)


class Trajectories:
    """Made once, a file a batch, into a folder; then read at random. A video's noise depends on its number alone."""

    def __init__(
        self, folder: Path, spec: OdeSpec, *, latents: Clips, frames: int, flow: Flow, dtype: torch.dtype, seed: int
    ) -> None:
        self.folder, self.spec, self.latents, self.dtype, self.seed = folder, spec, latents, dtype, seed
        self.rows = latents.rows("train")
        self.shape = (frames, *latents.shape)
        self.path = spec.levels(flow)
        self.sigmas = [self.path[step] for step in (*spec.keep, spec.steps)]  # of what is kept

    def make(self, model: Denoiser, null: Float[Tensor, "T E"], log: Log) -> None:
        """Those that are not there yet: a file has its name only when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        firsts = range(0, self.spec.videos, self.spec.batch)[rank() :: ranks()]  # the loop's first act is to wait for all ranks
        left = [first for first in firsts if not whole(self._file(first))]
        total, still = (sum(len(self._batch(first)) for first in some) for some in (firsts, left))
        bar = log.progress(total, "video", total - still)
        for first in left:
            videos = self._batch(first)
            noise = torch.stack([gaussian(self.shape, torch.Generator().manual_seed(self.seed + video)) for video in videos])
            states = trajectory(model, self.text(videos), noise, levels=self.path, guidance=self.spec.guidance, null=null)
            kept = [x.to("cpu", self.dtype) for step, x in enumerate(states) if step in (*self.spec.keep, self.spec.steps)]
            write(self._file(first), torch.stack(kept, dim=1))
            bar.update(len(videos))
        bar.close()

    def read(self, videos: list[int]) -> Float[Tensor, "B K F C H W"]:
        """The kept states of these videos, the noisiest first and x_0 last."""
        parts = []
        for video in videos:
            first = video - video % self.spec.batch
            with safe_open(self._file(first), framework="pt") as file:
                parts.append(file.get_slice("states")[video - first])
        return torch.stack(parts).float()

    def text(self, videos: list[int]) -> Float[Tensor, "B T E"]:
        """Captions of the training clips, one after the other, again from the first after the last."""
        return self.latents.text([self.rows[video % len(self.rows)] for video in videos])

    def _batch(self, first: int) -> list[int]:
        return list(range(first, min(first + self.spec.batch, self.spec.videos)))

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"


@torch.no_grad()
def trajectory(
    model: Denoiser,
    text: Float[Tensor, "B T E"],
    noise: Float[Tensor, "B F C H W"],
    *,
    levels: list[float],
    guidance: float,
    null: Float[Tensor, "T E"],
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """The state before every Euler step of a bidirectional model, and x_0."""
    at = next(model.parameters()).device
    x, text, null = noise.to(at), text.to(at), null.to(at)
    yield x
    for high, low in pairwise(levels):
        sigma = x.new_full((len(x),), high)
        velocity = model.velocity(x, sigma, text)
        if guidance != 1:
            away = model.velocity(x, sigma, null.expand_as(text))
            velocity = away + guidance * (velocity - away)
        x = x + (low - high) * velocity
        yield x


def whole(file: Path) -> bool:
    """A kill leaves no half-written file under this name, but a machine that lost power can."""
    try:
        check_whole(file)
    except ValueError:
        return False
    return True


def write(path: Path, states: Tensor) -> None:
    partial = path.with_suffix(".partial")
    save_file({"states": states.contiguous()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
